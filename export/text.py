"""Text: embeddings, classifiers, rerankers, labels of tokens, with their tokenizers; a head over embeddings, a gate.

Which of these a checkpoint is, its architecture says (text_checkpoint.py); the tokenizer is a python step of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from tutti.export import layout, lengths, onnx, text_trials
from tutti.export.ensemble import chain, entities_step, labels_step
from tutti.export.errors import ExportError
from tutti.export.graphs import Arrays, Check, Claim, Graph, Product
from tutti.export.labelled import read as read_labelled
from tutti.export.sources import Source
from tutti.export.text_checkpoint import load
from tutti.export.text_encoder import MAX_BATCH_SIZE, Encoder, example_of
from tutti.export.text_labelled import check_accuracy, gate_step, head_graph, train_head
from tutti.export.text_tokenizer import check_step, check_tokenizer, tokenizer_step
from tutti.export.variants import Result

_MIN_GATE_RECALL = 0.95


def _cases(encoder: Encoder, samples: Sequence[str]) -> list[Arrays]:
    """Random ids of several batches and lengths, texts where there is a tokenizer, and the user's own."""
    rng = np.random.default_rng(0)
    cases: list[Arrays] = []
    # Not of more tokens than its tokenizer makes: 8 bits are fitted to what the cases have.
    longest = (3, encoder.max_length) if encoder.max_length <= lengths.LONGEST_PROVEN // 2 else (1, 1024)
    for batch, most in ((1, 2), (1, 16), (2, 32), (5, 33), longest):
        length = min(most, encoder.max_length)
        mask = np.ones((batch, length), dtype=np.int64)
        mask[-1, max(1, length // 2) :] = 0
        ids = rng.integers(0, encoder.vocabulary, size=(batch, length)) * mask
        types = np.arange(length) // max(1, length // 3) % 2 * mask
        case = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        cases.append({name: case[name] for name in encoder.inputs})
    if encoder.tokenizer is not None:
        cases += [encoder.tokens(text_trials.SENTENCES), encoder.tokens(text_trials.SENTENCES[:1])]
        cases += [encoder.tokens(samples[start : start + 32]) for start in range(0, len(samples), 32)]
    return cases


def _claim(encoder: Encoder) -> Claim | None:
    """Of how many tokens there may be, by rows without padding, which some models give no places of its own."""
    if encoder.places is None:
        return None
    token = next(
        candidate for candidate in (2, 3) if candidate != getattr(encoder.module.model.config, "pad_token_id", None)
    )
    return Claim(
        encoder.places,
        lambda length: {
            name: np.full((1, length), {"input_ids": token, "attention_mask": 1}.get(name, 0), np.int64)
            for name in encoder.inputs
        },
    )


def graph(encoder: Encoder, name: str, samples: Sequence[str] = ()) -> Graph:
    """NAME_encoder, NAME_classifier, NAME_ranker or NAME_tagger."""
    example = example_of(encoder)
    usual = min(64, encoder.max_length)
    shapes = ((1, min(16, usual)), (8, usual), (MAX_BATCH_SIZE, encoder.max_length))
    is_of_rows = encoder.kind in ("classification", "ranking")
    return Graph(
        f"{name}_{encoder.model}",
        encoder.module,
        example,
        (encoder.output,),
        {tensor: {0: onnx.BATCH, 1: "length"} for tensor in example},
        _cases(encoder, samples),
        dict.fromkeys(example, shapes),
        max_batch_size=MAX_BATCH_SIZE,
        labels=encoder.labels if is_of_rows else (),
        decision=encoder.output if encoder.labels else "",
        lengths=_claim(encoder),
    )


def _samples(path: Path | None) -> list[str]:
    """The lines of a text file."""
    if path is None:
        return []
    if not path.is_file():
        raise ExportError(f"--samples {path}: expected a file with a text on each line")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _known(check: Check, results: Mapping[str, Result]) -> Check:
    """One that needs no result."""
    return check


def product(
    source: Source,
    name: str,
    ensemble: str,
    work: Path,
    task: str,
    labelled: Path | None,
    samples: Path | None,
    prompt: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Product:
    """NAME_tokenizer with the graph over its ids; given a labelled file, a head and a gate, too.

    `tell` is told what is begun.
    """
    encoder = load(source, task, prompt)
    graphs = [graph(encoder, name, _samples(samples))]
    steps: list[layout.Entry] = []
    checks: list[Callable[[Mapping[str, Result]], Check]] = [partial(_known, check) for check in encoder.checks]
    accuracy = None
    if encoder.tokenizer is not None:
        steps.append(tokenizer_step(encoder, name, work))
        checks.append(lambda _: check_tokenizer(encoder, encoder.module.model.config))
        checks.append(lambda _: check_step(encoder, work / "tokenizer.json"))
    labels: Sequence[str] = encoder.labels
    if labelled is not None:
        if encoder.labels or encoder.tokenizer is None:
            raise ExportError(
                "--labelled trains a head over embeddings: expected a checkpoint with a tokenizer, to embed"
            )
        tell(f"train a head and a gate on {labelled}")
        examples = read_labelled(labelled)
        head, embeddings, accuracy = train_head(encoder, examples)
        labels = examples.labels
        graphs.append(head_graph(head, embeddings, labels, name))
        checks.append(check_accuracy(encoder, head, examples, name))
        gate, recall = gate_step(examples, name, work)
        if recall < _MIN_GATE_RECALL:
            raise ExportError(f"the text gate lets {recall:.3f} of the texts through that it must, not 0.95")
        steps.append(gate)
    make = None
    if ensemble and encoder.tokenizer is not None:
        last: list[layout.Entry] = []
        if labels:
            last = [(entities_step if encoder.kind == "tokens" else labels_step)(name, labels, work)]
        steps += last
        names = [f"{name}_tokenizer", *(graph.name for graph in graphs), *(graph.name for graph in last)]
        make = lambda entries: chain(ensemble, encoder.texts, [entries[entry] for entry in names])  # noqa: E731
    tell("ask the checkpoint itself" if make is not None and labelled is None else "prepare the graphs")
    asked = text_trials.trials(encoder, source) if make is not None and labelled is None else []
    return Product(graphs, steps, make, source.provenance, checks, accuracy, asked)
