"""What is known of an item: when people speak and how loud, what the text says, what the picture shows, one score.

Any of AUDIO, TEXT and IMAGE may be given. A cheap look at the text decides whether its encoder runs.
"""

from pathlib import Path

from tutti.ensembles.builder import Graph, Tensor

# None of the held-out texts that are unsafe has a lower risk.
RISK = 0.2


def build(repository: Path) -> Graph:
    graph = Graph("content_intelligence", repository, max_batch_size=32)
    audio = graph.input("AUDIO", "FP32", [-1], optional=True)  # 16 kHz mono PCM in [-1, 1]
    text = graph.input("TEXT", "BYTES", [1], optional=True)  # UTF-8
    image = graph.input("IMAGE", "BYTES", [1], optional=True)  # a JPEG or PNG file

    speech = graph.step("speech_vad", AUDIO=audio)
    segments = graph.step("speech_segments", SPEECH_PROBS=speech["SPEECH_PROBS"])
    levels = _levels(graph, audio, segments["SEGMENTS"])

    gate = graph.step("text_gate", TEXT=text)
    with graph.where(gate["RISK"] > RISK):
        tokens = graph.step("text_tokenizer", TEXT=text)
        encoded = graph.step("text_encoder", tokens.as_inputs())
        labels = graph.step("text_classifier", EMBEDDING=encoded["EMBEDDING"])

    pixels = graph.step("image_decoder", IMAGE=image)
    shown = graph.step("image_classifier", PIXELS=pixels["PIXELS"])

    score = graph.step(
        "moderation_score",
        SPEECH_PROBS=speech["SPEECH_PROBS"],
        TEXT_RISK=gate["RISK"],
        LABEL_SCORES=labels["LABEL_SCORES"],
        IMAGE_SCORES=shown["IMAGE_SCORES"],
    )

    graph.output("SPEECH_PROBS", speech["SPEECH_PROBS"])  # per 32 ms
    graph.output("SEGMENTS", segments["SEGMENTS"])  # start and end in seconds
    graph.output("SEGMENT_LEVELS", levels)  # dBFS of each segment
    graph.output("TEXT_RISK", gate["RISK"])
    graph.output("EMBEDDING", encoded["EMBEDDING"], default=0)
    graph.output("LABEL_SCORES", labels["LABEL_SCORES"], default=0)
    graph.output("IMAGE_SCORES", shown["IMAGE_SCORES"])
    graph.output("MODERATION_SCORE", score["MODERATION_SCORE"])
    return graph


def _levels(graph: Graph, audio: Tensor, segments: Tensor) -> Tensor:
    """How loud each segment of speech is: its clip is cut out, and its level is taken once for each clip."""
    clips = graph.step("speech_clips", AUDIO=audio, SEGMENTS=segments)
    graph.items(clips["CLIPS"], clips["COUNT"])
    graph.items(clips["SAMPLES"], clips["COUNT"])
    levels = graph.step(
        "speech_level", CLIP=clips["CLIPS"], SAMPLES=clips["SAMPLES"], each=[clips["CLIPS"], clips["SAMPLES"]]
    )
    return levels["LEVEL"]
