"""Small checkpoints of every family, with a fixed seed, saved as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = (
    "act",
    "now",
    "and",
    "win",
    "a",
    "free",
    "phone",
    "the",
    "meeting",
    "is",
    "at",
    "ten",
    "photo",
    "of",
    "cat",
    "dog",
)


def word_pieces(folder: Path, extra: int = 0, most_tokens: int = 48) -> Any:
    """A BERT tokenizer over a few words and all letters, which says that its model takes `most_tokens`."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *(set(LETTERS) - {"a"}),
        *(f"##{x}" for x in LETTERS),
    ]
    tokens = list(dict.fromkeys(sorted(tokens[5:])))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tokens, *(f"extra{i}" for i in range(extra))]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=most_tokens)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save(model: Any, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    return folder


def _wide(model: Any) -> Any:
    """Weights of some size, so that answers differ: tiny models start near zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.6 / parameter.shape[-1] ** 0.5 * 2)
    return model


def text(folder: Path, kind: str, is_classifier: bool, positions: int = 64, most_tokens: int = 48) -> Path:
    """BERT, DistilBERT, DeBERTa, RoBERTa or MPNet, to embed or to classify into three."""
    import transformers

    torch.manual_seed(0)
    tokenizer = word_pieces(folder, most_tokens=most_tokens)
    shape = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    named = {"id2label": {0: "calm", 1: "loud", 2: "rude"}, "label2id": {"calm": 0, "loud": 1, "rude": 2}}
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    configs: dict[str, dict[str, Any]] = {
        "bert": usual,
        "roberta": usual,
        "mpnet": usual,
        "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        "deberta-v2": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16,
            "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
        },
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(
        kind, **configs[kind], **shape, **(named if is_classifier else {}), max_position_embeddings=positions
    )
    family = transformers.AutoModelForSequenceClassification if is_classifier else transformers.AutoModel
    return _save(_wide(family.from_config(config)), folder)


def resnet(folder: Path) -> Path:
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
        id2label={0: "cat", 1: "dog", 2: "cow"}, label2id={"cat": 0, "dog": 1, "cow": 2},
    )  # fmt: skip
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875).save_pretrained(folder)
    return _save(ResNetForImageClassification(config), folder)


def vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(
        folder
    )
    return _save(_wide(ViTForImageClassification(config)), folder)


def contrastive(folder: Path, kind: str) -> Path:
    """CLIP or SigLIP over pictures of 32 x 32."""
    import transformers

    torch.manual_seed(0)
    tokenizer = word_pieces(folder)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    words = {
        **shape, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3,
    }  # fmt: skip
    pictures = {**shape, "image_size": 32, "patch_size": 8}
    if kind == "clip":
        made: Any = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=words, vision_config=pictures, projection_dim=24)
        )
        processor: Any = transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    else:
        made = transformers.SiglipModel(transformers.SiglipConfig(text_config=words, vision_config=pictures))
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return _save(made, folder)


def spectrogram_transformer(folder: Path) -> Path:
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_length=128,
        num_mel_bins=128, id2label={0: "speech", 1: "music", 2: "silence"},
        label2id={"speech": 0, "music": 1, "silence": 2},
    )  # fmt: skip
    ASTFeatureExtractor(max_length=128).save_pretrained(folder)
    return _save(_wide(ASTForAudioClassification(config)), folder)


def waveform(folder: Path, kind: str) -> Path:
    """wav2vec 2.0 or WavLM."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        conv_dim=[16, 16, 16], conv_stride=[5, 4, 4], conv_kernel=[10, 8, 4], num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, classifier_proj_size=16, feat_extract_norm="group",
        id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1},
    )  # fmt: skip
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return _save(_wide(transformers.AutoModelForAudioClassification.from_config(config)), folder)


def clap(folder: Path) -> Path:
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    torch.manual_seed(0)
    sound = {
        "spec_size": 128, "num_mel_bins": 64, "patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1],
        "num_attention_heads": [2, 2], "window_size": 4, "enable_fusion": False, "projection_dim": 16, "patch_size": 4,
        "patch_stride": [4, 4], "fusion_num_hidden_layers": 1,
    }  # fmt: skip
    words = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 60,
    }
    config = ClapConfig(text_config=words, audio_config=sound, projection_dim=16)
    ClapFeatureExtractor(truncation="rand_trunc", max_length_s=1).save_pretrained(folder)
    return _save(ClapModel(config), folder)


def whisper(folder: Path, **shape: Any) -> Path:
    """Of a 64-dimensional encoder and decoder, over clips of two seconds, unless `shape` says otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    torch.manual_seed(0)
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|de|>",
        "<|translate|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, *special])}
    own = Tokenizer(models.BPE(vocabulary, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token=special[0], pad_token=special[0], bos_token=special[0]
    ).save_pretrained(folder)
    ids = {token: vocabulary[token] for token in special}
    end = ids["<|endoftext|>"]
    sizes = {
        "vocab_size": len(vocabulary), "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "max_source_positions": 100, "max_target_positions": 64, **shape,
    }  # fmt: skip
    config = WhisperConfig(
        **sizes, num_mel_bins=80, eos_token_id=end, bos_token_id=end, pad_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"], suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = _wide(WhisperForConditionalGeneration(config))
    with torch.no_grad():  # what comes next follows from the place and the sound, not from the last token alone
        model.model.decoder.embed_positions.weight *= 6
        for layer in model.model.decoder.layers:
            layer.encoder_attn.out_proj.weight *= 6
    generation = model.generation_config
    generation._from_model_config = False  # or it is made anew from the configuration, at loading
    generation.is_multilingual = True
    generation.lang_to_id = {one: ids[one] for one in ("<|en|>", "<|de|>")}
    generation.task_to_id = {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]}
    generation.no_timestamps_token_id = ids["<|notimestamps|>"]
    generation.suppress_tokens = [ids["<|startoftranscript|>"], ids["<|en|>"], 5]
    generation.begin_suppress_tokens = [end, 220]
    generation.max_length = sizes["max_target_positions"] - 20
    seconds = sizes["max_source_positions"] // 50
    WhisperFeatureExtractor(feature_size=80, chunk_length=seconds).save_pretrained(folder)
    return _save(model, folder)
