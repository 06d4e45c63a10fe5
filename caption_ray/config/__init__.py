"""Every setting of caption_ray: typed, with its bounds and one default in one place.

`parse` turns a command line into a `Config`, `parse_arguments` one into a job's own arguments, and
`from_dict` reads a saved JSON file; all three refuse what cannot work. Nothing here imports torch
or ray.
"""

from caption_ray.config.bounds import (
    RULES,
    SMALLEST,
    Bytes,
    Count,
    FileName,
    GPUs,
    Length,
    Name,
    Names,
    Parallel,
    Positive,
    PositiveOrZero,
    Seed,
    Size,
    Uri,
    check,
    from_environment,
    require,
)
from caption_ray.config.model import DecoderConfig, EncoderConfig, ModelConfig
from caption_ray.config.parsing import from_dict, parse, parse_arguments, to_dict
from caption_ray.config.presets import (
    DEFAULT_PRESET,
    PRESETS,
    coco,
    coco_self_critical,
    coco_transformer,
    coco_transformer_self_critical,
    photos,
    seed,
    shapes,
)
from caption_ray.config.search import SearchConfig, SearchOverrides, validate_search
from caption_ray.config.settings import (
    STORAGE_VARIABLE,
    Config,
    DataConfig,
    RunConfig,
    TokenizerName,
    TrainConfig,
    default_storage,
)
from caption_ray.config.source import SourceConfig

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "RULES",
    "SMALLEST",
    "STORAGE_VARIABLE",
    "Bytes",
    "Config",
    "Count",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "FileName",
    "GPUs",
    "Length",
    "ModelConfig",
    "Name",
    "Names",
    "Parallel",
    "Positive",
    "PositiveOrZero",
    "RunConfig",
    "SearchConfig",
    "SearchOverrides",
    "Seed",
    "Size",
    "SourceConfig",
    "TokenizerName",
    "TrainConfig",
    "Uri",
    "check",
    "coco",
    "coco_self_critical",
    "coco_transformer",
    "coco_transformer_self_critical",
    "default_storage",
    "from_dict",
    "from_environment",
    "parse",
    "parse_arguments",
    "photos",
    "require",
    "seed",
    "shapes",
    "to_dict",
    "validate_search",
]
