"""Batches for tiny models: text, and the images that some of them take with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS, LENGTH = 2, 12
VOCABULARY = 97
HIDDEN = 32


def batch(vocabulary: int, special: list[int] | None = None) -> dict[str, Tensor]:
    """Two rows, the second one shorter, without special ids; ignored labels in other places of each row."""
    ids = torch.randint(3, vocabulary, (ROWS, LENGTH))
    ids[torch.isin(ids, torch.tensor(special or []))] = 3
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    ids[mask == 0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, [0, 1, 6]] = -100
    labels[1, [3, 4]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def codebooks(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Music: [rows · codebooks, length] ids, and labels with the codebooks last."""
    count = model.config.num_codebooks
    shifted = [inputs["labels"].roll(k, 0) for k in range(count)]
    ids = torch.stack([inputs["input_ids"].roll(k, 0) for k in range(count)], 1)
    return inputs | {"input_ids": ids.flatten(0, 1), "labels": torch.stack(shifted, -1)}


def pixels(config: Any) -> dict[str, Tensor]:
    """One image a row."""
    size = getattr(config, "vision_config", config).image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return {"pixel_values": torch.randn(ROWS, 3, height, width)}


def sized_pixels(config: Any) -> dict[str, Tensor]:
    images = pixels(config)
    return images | {"image_sizes": torch.tensor([images["pixel_values"].shape[-2:]] * ROWS)}


def tiles(config: Any) -> dict[str, Tensor]:
    """Two images a row."""
    size = config.vision_config.image_size
    return {"pixel_values": torch.randn(ROWS, 2, 3, size, size)}


def sized_tiles(config: Any) -> dict[str, Tensor]:
    """One image a row twice as wide as high: the whole in one tile, its halves in two more."""
    size = config.vision_config.image_size
    return {
        "pixel_values": torch.randn(ROWS, 3, 3, size, size),
        "image_sizes": torch.tensor([[size, 2 * size]] * ROWS),
    }


def patches(config: Any) -> dict[str, Tensor]:
    """One image a row of 2 × 4 patches, all in one list."""
    vision = config.vision_config
    width = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return {"pixel_values": torch.randn(ROWS * 8, width), "image_grid_thw": torch.tensor([[1, 2, 4]] * ROWS)}


def square_patches(config: Any) -> dict[str, Tensor]:
    """The same, each patch an image of its own."""
    images, size = patches(config), config.vision_config.patch_size
    return images | {"pixel_values": images["pixel_values"].reshape(ROWS * 8, 3, size, size)}


def crossed_tiles(config: Any) -> dict[str, Tensor]:
    """One image a row, in one tile of its own attention layers; all tokens see it."""
    vision = config.vision_config
    count, size = vision.max_num_tiles, vision.image_size
    shown = (torch.arange(count) == 0).long()
    return {
        "pixel_values": torch.randn(ROWS, 1, count, 3, size, size),
        "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
        "aspect_ratio_mask": shown.expand(ROWS, 1, count),
        "cross_attention_mask": shown.expand(ROWS, LENGTH, 1, count),
    }


def placed_patches(config: Any) -> dict[str, Tensor]:
    """One image a row of 4 × 4 patches, with their columns and rows."""
    vision = config.vision_config
    columns, rows = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
    places = torch.stack([columns, rows], -1).reshape(1, 16, 2).repeat(ROWS, 1, 1)
    return {"pixel_values": torch.rand(ROWS, 16, 3 * vision.patch_size**2), "image_position_ids": places}


_IMAGES: dict[Callable[[Any], dict[str, Tensor]], str] = {
    pixels: "AyaVision Cohere2Vision Gemma3 GotOcr2 InternVL Llama4 Llava Ovis2 PaliGemma QianfanOCR Step3p7 "
    "VideoLlava VipLlava",
    sized_pixels: "LightOnOcr Mistral3 MistralLarge4",
    tiles: "Idefics2 Idefics3 SmolVLM",
    sized_tiles: "LlavaNext LlavaNextVideo LlavaOnevision",
    patches: "CohereCompass Cosmos3Edge Cosmos3Omni Ernie4_5_VLMoe Exaone4_5_ Glm46V Glm4v Glm4vMoe Glm5Next GlmOcr "
    "HunYuanVL HyperCLOVAXVisionV2 Lfm3Vl MiniMaxM3Sparse Qwen2VL Qwen2_5OmniThinker Qwen2_5_VL Qwen3OmniMoeThinker "
    "Qwen3VL Qwen3VLMoe Qwen3_5 Qwen3_5Moe Qwen4Exp",
    square_patches: "PaddleOCRVL",
    placed_patches: "Gemma4",
    crossed_tiles: "Mllama",
}
IMAGES = {f"{name}ForConditionalGeneration": make for make, names in _IMAGES.items() for name in names.split()}
WITH_IMAGE = " + image"


def with_image(model: Any, inputs: dict[str, Tensor], images: dict[str, Tensor]) -> dict[str, Tensor]:
    """The images of each row after its first token, in as many places as the model makes features of them.

    There are no labels at these places. A model that gives images no places among the tokens gets them beside.
    """
    if not hasattr(model, "get_image_features"):
        return inputs | images
    with torch.no_grad():
        features = model.get_image_features(**images)
    if not isinstance(features, (Tensor, list, tuple)):
        pooled = getattr(features, "pooler_output", None)
        features = features.last_hidden_state if pooled is None else pooled
    count = sum(f.numel() for f in features) // HIDDEN // ROWS
    config = model.config
    token = getattr(config, "image_token_id", None)
    token = config.image_token_index if token is None else token

    def widened(values: Tensor, fill: int) -> Tensor:
        return torch.cat([values[:, :1], values.new_full((ROWS, count), fill), values[:, 1:]], 1)

    fill = {"input_ids": token, "attention_mask": 1, "labels": -100}
    wide = {name: widened(values, fill[name]) for name, values in inputs.items()}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inspect.signature(type(model).forward).parameters:
            wide[name] = (wide["input_ids"] == token).long()
    return wide | images


def with_pixels(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return with_image(model, inputs, pixels(model.config))


def asked_images(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images with a question to them."""
    question = {"qformer_input_ids": torch.randint(3, VOCABULARY, (ROWS, 5))}
    return with_image(model, inputs, pixels(model.config) | question)


def masked_images(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images that the rows attend to."""
    images = pixels(model.config)["pixel_values"][:, None]
    return inputs | {"pixel_values": images, "image_attention_mask": torch.ones(ROWS, LENGTH, 1, dtype=torch.long)}


def marked_images(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images in the places of some tokens."""
    places = torch.zeros_like(inputs["input_ids"])
    places[:, 1 : 1 + model.config.latent_query_num] = 1
    return inputs | pixels(model.config) | {"image_embeds_position_mask": places.bool()}


def boxes(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The places of words on a page."""
    return inputs | {"bbox": torch.rand(ROWS, LENGTH, 4)}


def no_image(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs | {"mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}


INPUTS: dict[str, Callable[[Any, dict[str, Tensor]], dict[str, Any]]] = {
    "Blip2ForConditionalGeneration": with_pixels,
    "BlipForConditionalGeneration": with_pixels,
    "GitForCausalLM": with_pixels,
    "IdeficsForVisionText2Text": masked_images,
    "InstructBlipForConditionalGeneration": asked_images,
    "Kosmos2ForConditionalGeneration": marked_images,
    "Molmo2ForConditionalGeneration": no_image,
    "MusicgenForCausalLM": codebooks,
    "MusicgenMelodyForCausalLM": codebooks,
    "UdopForConditionalGeneration": boxes,
}
