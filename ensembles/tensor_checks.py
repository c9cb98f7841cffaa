"""Which tensors a graph has, of which datatypes and shapes, and whether each fits where it is mapped to."""

from tutti.core.types import Shape
from tutti.ensembles.axes import Axis, shapes_fit
from tutti.ensembles.extensions import Extensions
from tutti.ensembles.graph import ConfigOf, Each, fail
from tutti.ensembles.spelling import near
from tutti.repository.model_config import EnsembleStep, ModelConfig, TensorSpec

_BY_STEP = ("when", "each", "gather", "optional")
_WHOLE = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")


class GraphTensors:
    """All tensors of a graph, by name. Its constructor raises GraphError for what does not fit."""

    def __init__(self, config: ModelConfig, extra: Extensions, config_of: ConfigOf) -> None:
        self.config = config
        self.extra = extra
        self._config_of = config_of
        self.models = [self._model(step) for step in config.steps]
        self.producer: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {spec.name: config.wire_shape(spec) for spec in config.inputs}
        self.datatypes = {spec.name: spec.datatype for spec in config.inputs}
        self.each: dict[int, Each] = {}
        # The tensors whose shapes begin with a batch axis; and how steps' tensors are handed over where they differ.
        self._batched = {spec.name for spec in config.inputs} if config.is_batched else set[str]()
        self.axes_in: dict[int, list[Axis]] = {}
        self.axes_out: dict[int, list[Axis]] = {}
        self._find_producers()
        for check in (self._find_each, self._add_outputs, self._check_inputs):
            for index in range(len(config.steps)):
                check(index)
        self._check_counts()
        self._check_outputs()

    def _find_producers(self) -> None:
        for index, step in enumerate(self.config.steps):
            for tensor in step.output_map.values():
                if tensor in self.producer or tensor in self.shapes:
                    raise fail(self.config, self.path(index, "output_map"), f"tensor '{tensor}' is made more than once")
                self.producer[tensor] = index
        for tensor in (*self.extra.when, *self.extra.each, *self.extra.gather, *self.extra.optional):
            if tensor not in self.producer:
                kind = next(kind for kind in _BY_STEP if tensor in getattr(self.extra, kind))
                why = f"no step makes a tensor of that name{near(tensor, self.producer)}"
                raise fail(self.config, f"parameters.tutti.{kind}.{tensor}", why)

    def path(self, index: int, part: str = "") -> str:
        """The name of a step, or of a part of it, in errors."""
        return f"step {index} '{self.config.steps[index].model_name}'" + (f" {part}" if part else "")

    def _model(self, step: EnsembleStep) -> ModelConfig:
        if step.model_name == self.config.name:
            raise fail(self.config, f"step '{step.model_name}'", "an ensemble cannot use itself")
        try:
            return self._config_of(step.model_name, step.version)
        except Exception as error:
            raise fail(self.config, f"step '{step.model_name}'", f"its model is not available: {error}") from None

    def _find_each(self, index: int) -> None:
        outputs = self.config.steps[index].output_map.values()
        each = {self.extra.each[tensor] for tensor in outputs if tensor in self.extra.each}
        if not each:
            for tensor in outputs:
                if tensor in self.extra.gather:
                    raise fail(self.config, f"parameters.tutti.gather.{tensor}", f"needs tutti.each.{tensor}")
            return
        items = tuple(dict.fromkeys(name for names in each for name in names))
        path = f"{self.path(index)} tutti.each"
        mapped = self.config.steps[index].input_map.values()
        for name in items:
            if name not in mapped:
                why = f"the step has no input '{name}', it has {sorted(set(mapped))}{near(name, mapped)}"
                raise fail(self.config, path, why)
        if not self.config.is_batched or not self.models[index].is_batched:
            raise fail(self.config, path, "needs max_batch_size of at least 1, of the ensemble and of the model")
        counts = {self.extra.items[name] for name in items if name in self.extra.items}
        if len(counts) > 1:
            raise fail(self.config, path, f"its items are counted by more than one tensor: {sorted(counts)}")
        self.each[index] = Each(items, next(iter(counts), ""))

    def _add_outputs(self, index: int) -> None:
        """Shapes and datatypes of what a step makes."""
        model, step = self.models[index], self.config.steps[index]
        specs = {spec.name: spec for spec in model.outputs}
        for model_tensor, tensor in step.output_map.items():
            if model_tensor not in specs:
                path = self.path(index, f"output_map '{model_tensor}'")
                raise fail(self.config, path, f"the model has outputs {sorted(specs)}{near(model_tensor, specs)}")
            shape = model.wire_shape(specs[model_tensor])
            datatype = specs[model_tensor].datatype
            gather = self.extra.gather.get(tensor, "concat")
            if index in self.each and gather == "concat":
                shape = (shape[0], -1, *shape[1:])
            elif index in self.each and datatype in ("BYTES", "BOOL"):
                raise fail(self.config, f"parameters.tutti.gather.{tensor}", f"{gather} of {datatype}: expected concat")
            if index not in self.each:
                shape = self._kept(index, model_tensor, tensor, shape)
            elif model.is_batched:
                self._batched.add(tensor)
            self.shapes[tensor], self.datatypes[tensor] = shape, datatype

    def _kept(self, index: int, model_tensor: str, tensor: str, shape: Shape) -> Shape:
        """The shape that the graph goes on with, of one that a step makes: the batch axis may be another's affair."""
        is_batched = self.models[index].is_batched
        if is_batched:
            self._batched.add(tensor)
        ranks = self._ranks(tensor)
        if not is_batched and self.config.is_batched and ranks == {len(shape) + 1}:
            self.axes_out.setdefault(index, []).append(Axis(model_tensor, len(shape), True))
            self._batched.add(tensor)
            return (-1, *shape)
        if is_batched and not self.config.is_batched and self._rank_of_output(tensor) == len(shape) - 1:
            self.axes_out.setdefault(index, []).append(Axis(model_tensor, len(shape) - 1, False))
            self._batched.discard(tensor)
            return shape[1:]
        return shape

    def _rank_of_output(self, tensor: str) -> int | None:
        """The rank of an output of the ensemble; None where the tensor is none."""
        return next((len(self.config.wire_shape(spec)) for spec in self.config.outputs if spec.name == tensor), None)

    def _ranks(self, tensor: str) -> set[int]:
        """The ranks that models with a batch, and the ensemble's answer, expect of a tensor."""
        ranks = {
            len(model.wire_shape(spec))
            for model, step in zip(self.models, self.config.steps, strict=True)
            for spec in model.inputs
            if model.is_batched and step.input_map.get(spec.name) == tensor
        }
        of_output = self._rank_of_output(tensor)
        return ranks if of_output is None else ranks | {of_output}

    def _check_inputs(self, index: int) -> None:
        model, step = self.models[index], self.config.steps[index]
        specs = {spec.name: spec for spec in model.inputs}
        path = self.path(index, "input_map")
        for name, spec in specs.items():
            if name not in step.input_map and not spec.is_optional:
                raise fail(self.config, path, f"input '{name}' of the model is not mapped")
        for model_tensor, tensor in step.input_map.items():
            if model_tensor not in specs:
                why = f"the model has inputs {sorted(specs)}{near(model_tensor, specs)}"
                raise fail(self.config, f"{path} '{model_tensor}'", why)
            if tensor not in self.shapes:
                why = f"nothing makes ensemble tensor '{tensor}'{near(tensor, self.shapes)}"
                raise fail(self.config, f"{path} '{model_tensor}'", why)
            self._check_fit(index, f"{path} '{model_tensor}'", specs[model_tensor], tensor)

    def _check_counts(self) -> None:
        for name, count in self.extra.items.items():
            path = f"parameters.tutti.items.{name}"
            if name not in self.shapes or count not in self.shapes:
                absent = count if name in self.shapes else name
                raise fail(self.config, path, f"nothing makes '{absent}'{near(absent, self.shapes)}")
            if self.dims(count) not in ((), (1,)) or self.datatypes[count] not in _WHOLE:
                got = f"'{count}' is {self.datatypes[count]} with dims {list(self.dims(count))}"
                raise fail(self.config, path, f"expected one whole number a row, {got}")
            if self.extra.default.get(count, "0") != "0":
                why = "a row without items has none: expected 0"
                raise fail(self.config, f"parameters.tutti.default.{count}", why)

    def _check_fit(self, index: int, path: str, spec: TensorSpec, tensor: str) -> None:
        shape, datatype = self.shapes[tensor], self.datatypes[tensor]
        if datatype != spec.datatype:
            raise fail(
                self.config, path, f"expected datatype {spec.datatype}, ensemble tensor '{tensor}' is {datatype}"
            )
        expected = self.models[index].wire_shape(spec)
        each = self.each.get(index)
        if each is not None and tensor in each.items:
            expected = (expected[0], -1, *expected[1:])
        if not shapes_fit(expected, shape) and not self._is_handed_over(index, spec, tensor):
            items = "items of " if each is not None and tensor in each.items else ""
            raise fail(
                self.config,
                path,
                f"expected shape {list(expected)}, {items}ensemble tensor '{tensor}' has {list(shape)}",
            )

    def _is_handed_over(self, index: int, spec: TensorSpec, tensor: str) -> bool:
        """Whether a tensor fits a step's input once a batch axis is put in front of it, or taken away; notes which."""
        shape, model = self.shapes[tensor], self.models[index]
        is_added = model.is_batched and tensor not in self._batched and not self.config.is_batched
        is_taken = not model.is_batched and tensor in self._batched
        if not (is_added or is_taken) or not shapes_fit(spec.dims, shape if is_added else shape[1:]):
            return False
        self.axes_in.setdefault(index, []).append(Axis(spec.name, len(spec.dims), is_added))
        return True

    def dims(self, tensor: str) -> Shape:
        """Without the batch axis."""
        return self.shapes[tensor][1:] if self.config.is_batched else self.shapes[tensor]

    def _check_outputs(self) -> None:
        for spec in self.config.outputs:
            path = f"output '{spec.name}'"
            if spec.name not in self.producer:
                raise fail(self.config, path, f"no step makes it{near(spec.name, self.producer)}")
            if self.datatypes[spec.name] != spec.datatype:
                datatype = self.datatypes[spec.name]
                raise fail(self.config, path, f"configured as {spec.datatype}, its step makes {datatype}")
            if not shapes_fit(self.config.wire_shape(spec), self.shapes[spec.name]):
                expected = f"configured with shape {list(self.config.wire_shape(spec))}"
                raise fail(self.config, path, f"{expected}, its step makes {list(self.shapes[spec.name])}")
