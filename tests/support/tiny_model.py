"""A model small enough for any test, of the main job and of the GPU script."""

from storm_model.config import LanguageConfig, ModelConfig, VisionConfig

TINY = ModelConfig(
    "tiny",
    VisionConfig(image_size=56, patch_size=14, width=32, layers=2, heads=2, mlp_width=64),
    LanguageConfig("qwen2", 1, 64, 2, 1, 128, 512, 1e6, 4096, 1e-6),
    projector_layers=1,
)
