"""What every backend promises, as tests: a backend's author derives a class from BackendContract, and pytest runs it.

They load a model of the author's through an engine, as a server does, and know nothing of how it is executed. In a
package of one's own:

    class TestMine(BackendContract):
        config = 'backend: "mine" max_batch_size: 8 dynamic_batching {} input {...} output {...}'

        def write(self, folder): ...
        def inputs(self, rows, size, rng): ...
        def outputs(self, inputs): ...

Tests that need more than a class gives are skipped. pytest's `tmp_path` is all that they take.
"""

import gc
import importlib
import threading
import unittest
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2 as pb

from tutti.backends import completion, registry
from tutti.core.errors import Cancelled, ConfigError, DeadlineExceeded, Unavailable
from tutti.core.types import Call, InferResponse, Tensor, now_ns
from tutti.repository import backend_records
from tutti.serving.contract_model import (
    NAME,
    SIZE,
    TIMEOUT_S,
    ContractModel,
    Inputs,
    Settled,
    answers_of,
    held,
    wait_until,
)

__all__ = ["BackendContract", "Inputs"]

_DAMAGED = b"\x93this is no model of anybody's\x00\xff" * 8


class BackendContract(ContractModel):
    """Tests of one backend with one model of it, which is what a derived class says."""

    # Loading

    def test_its_record_is_true(self, tmp_path: Path) -> None:
        record = backend_records.find(self.proto().backend, NAME)
        assert record is not None, f"backend '{self.proto().backend}' is neither of tutti nor installed"
        module = importlib.import_module(record.module)
        assert callable(getattr(module, "load", None)), f"{record.module} has no load"
        has_complete = callable(getattr(module, "complete", None))
        assert has_complete or record.completes is None, f"{record.module} has no complete, as its record says"

    def test_a_model_is_ready_once_it_is_loaded(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            model = engine.model(NAME)
            assert model.is_ready(), model.reason()
            assert model.instances, "its instances are on no device"

    def test_an_instance_is_made_for_each_that_is_configured(self, tmp_path: Path) -> None:
        proto = self.proto()
        del proto.instance_group[:]
        proto.instance_group.add(count=2, kind=pb.ModelInstanceGroup.KIND_CPU)
        with self.engine(tmp_path, proto) as engine:
            instances = engine.model(NAME).instances
            assert instances.startswith("2 on "), f"configured are 2 instances, loaded {instances}"
            self.ask_in_turns(engine, range(8))

    def test_what_the_file_tells_need_not_be_configured(self, tmp_path: Path) -> None:
        proto = self.proto()
        record = backend_records.find(proto.backend, NAME)
        if record is None or record.completes is None:
            raise unittest.SkipTest("it completes no configuration")
        complete = self.folder(tmp_path / "complete")
        del proto.input[:], proto.output[:]
        short = self.folder(tmp_path / "short", proto)
        try:
            completed = completion.open_model(short, NAME).config
        except ConfigError as error:  # this model's file does not tell
            raise unittest.SkipTest(str(error)) from None
        configured = completion.open_model(complete, NAME).config
        for wanted, completed_specs in ((configured.inputs, completed.inputs), (configured.outputs, completed.outputs)):
            assert {(spec.name, spec.datatype) for spec in wanted} == {
                (spec.name, spec.datatype) for spec in completed_specs
            }

    def test_a_missing_file_is_an_error_that_names_the_model(self, tmp_path: Path) -> None:
        root = self.folder(tmp_path)
        files = list((root / NAME / "1").iterdir())
        if not files:
            raise unittest.SkipTest("it has no files")
        for path in files:
            path.unlink()
        self.assert_refused(root)

    def test_a_damaged_file_is_an_error_that_names_the_model(self, tmp_path: Path) -> None:
        root = self.folder(tmp_path)
        files = list((root / NAME / "1").iterdir())
        if not files or not self.knows_its_files:
            raise unittest.SkipTest("no bytes are wrong")
        for path in files:
            path.write_bytes(_DAMAGED)
        self.assert_refused(root)

    # Answers

    def test_a_request_is_answered(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            for rows in (1, 2, self.proto().max_batch_size):
                self.check(*self.ask(engine, [(rows, SIZE)])[0])

    def test_requests_of_a_batch_get_the_answers_to_their_own_rows(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            for request, answer in self.ask(engine, [(1 + index % 3, SIZE) for index in range(60)]):
                self.check(request, answer)

    def test_callers_at_once_get_their_own_answers(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            self.ask_in_turns(engine, range(24), threads=4)

    def test_requests_of_other_shapes_are_answered_beside_each_other(self, tmp_path: Path) -> None:
        if not self.is_variable():
            raise unittest.SkipTest("all its shapes are fixed")
        with self.engine(tmp_path) as engine:
            for request, answer in self.ask(engine, [(1 + index % 2, 1 + index % 7) for index in range(40)]):
                self.check(request, answer)

    def test_an_empty_request_is_answered_or_refused_and_costs_no_other(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            sizes = [(1, 0), (1, SIZE)] if self.is_variable() else [(0, SIZE), (1, SIZE)]
            (empty, answer), whole = self.ask(engine, sizes)
            if isinstance(answer, InferResponse):
                self.check(empty, answer)
            else:
                self.assert_names_model(answer)
            self.check(*whole)

    def test_only_the_outputs_that_are_asked_for_are_answered(self, tmp_path: Path) -> None:
        names = [output.name for output in self.proto().output]
        with self.engine(tmp_path) as engine:
            for name in names:
                request = self.request(1, SIZE)
                request.outputs = (name,)
                everything = self.request(1, SIZE)
                for asked, answer in zip((request, everything), answers_of(engine, [request, everything]), strict=True):
                    self.check(asked, answer)

    def test_inputs_are_left_as_they_came(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            requests = [self.request(2, SIZE) for _ in range(8)]
            before = [{name: tensor.array().copy() for name, tensor in request.inputs.items()} for request in requests]
            answers_of(engine, requests)
            for request, arrays in zip(requests, before, strict=True):
                for name, array in arrays.items():
                    assert np.array_equal(request.inputs[name].array(), array), f"input '{name}' was written to"

    def test_answers_stay_as_they_are_while_others_are_made(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            first = self.ask(engine, [(2, SIZE)] * 8)
            for _ in range(8):
                self.ask(engine, [(2, SIZE)] * 8)
            for request, answer in first:
                self.check(request, answer)

    # What is wrong

    def test_outputs_other_than_configured_are_errors_that_name_the_model(self, tmp_path: Path) -> None:
        if not self.has_checked_outputs:
            raise unittest.SkipTest("an output is what the model says it is")
        for number, change in enumerate((_rename, _lengthen, _retype)):
            proto = self.proto()
            change(proto.output[0])
            self.assert_fails_or_fits(self.folder(tmp_path / str(number), proto), proto)

    def test_a_request_that_fails_fails_alone(self, tmp_path: Path) -> None:
        requests = [self.request(1, SIZE) for _ in range(8)]
        poisoned = self.poison({name: tensor.array() for name, tensor in requests[3].inputs.items()})
        if poisoned is None:
            raise unittest.SkipTest("no inputs are known to fail")
        requests[3].inputs = {name: Tensor.of(name, array) for name, array in poisoned.items()}
        with self.engine(tmp_path) as engine:
            answers = answers_of(engine, requests)
            self.assert_names_model(answers[3])
            for index in {*range(8)} - {3}:
                self.check(requests[index], answers[index])
            self.check(*self.ask(engine, [(1, SIZE)])[0])

    def test_calls_that_nobody_waits_for_any_more_are_dropped(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            sink = Settled(12)
            calls = [Call(self.request(1, SIZE), sink) for _ in range(12)]
            for index, call in enumerate(calls):
                call.is_cancelled = index % 3 == 1
                call.deadline_ns = now_ns() - 1 if index % 3 == 2 else 0
            engine(calls)
            sink.wait()
            for index, call in enumerate(calls):
                if index % 3 == 0:
                    self.check(call.request, call.answer)
                else:  # one that is executed already is answered
                    assert isinstance(call.answer, InferResponse | Cancelled | DeadlineExceeded | Unavailable)

    # The end

    def test_calls_are_answered_though_the_model_is_unloaded_meanwhile(self, tmp_path: Path) -> None:
        with self.engine(tmp_path) as engine:
            for _ in range(2):
                sink = Settled(64)
                calls = [Call(self.request(1, SIZE), sink) for _ in range(64)]
                unloading = threading.Thread(target=engine.unload, args=(NAME,))
                engine(calls)
                unloading.start()
                sink.wait()
                unloading.join(TIMEOUT_S)
                assert not unloading.is_alive(), "it cannot be unloaded"
                for call in calls:
                    if not isinstance(call.answer, Unavailable):
                        self.check(call.request, call.answer)
                engine.load(NAME)
            self.check(*self.ask(engine, [(1, SIZE)])[0])

    def test_what_it_holds_is_given_back_when_it_is_closed(self, tmp_path: Path) -> None:
        root = self.folder(tmp_path)
        with self.serving(root) as engine:

            def serve_and_unload() -> None:
                engine.load(NAME)
                self.ask(engine, [(1, SIZE)] * 4)
                engine.unload(NAME)
                gc.collect()

            serve_and_unload()  # what a process keeps from then on
            before = held()
            for _ in range(2):
                serve_and_unload()
            message = f"more threads, open files or processes are left than the {before} before"
            wait_until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)), message)

    def test_nobody_keeps_an_instance_that_is_closed(self, tmp_path: Path) -> None:
        folder = completion.open_model(self.folder(tmp_path), NAME)
        loaded = registry.load(folder, 1, lambda calls: None)
        references = [weakref.ref(getattr(backend, "_backend", backend)) for backend in loaded]
        for backend in loaded:
            backend.close()
        del loaded, backend

        def are_gone() -> bool:
            gc.collect()
            return not any(reference() for reference in references)

        wait_until(are_gone, "an instance lives on")


def _rename(output: Any) -> None:
    output.name += "_by_another_name"


def _lengthen(output: Any) -> None:
    """An axis that no model has made."""
    output.dims.append(3)


def _retype(output: Any) -> None:
    output.data_type = pb.TYPE_STRING if output.data_type != pb.TYPE_STRING else pb.TYPE_FP32
