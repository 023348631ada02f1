"""How transformers loads an edited directory: a registered quantizer named "formulary" replays the edits on the meta skeleton.

This module imports nothing of formulary's that is heavy, since `import formulary` registers it while transformers is loading.
"""

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

WEIGHTS = "model.formulary.safetensors"
INDEX = f"{WEIGHTS}.index.json"


class FormularyConfig(QuantizationConfigMixin):
    """`config.quantization_config` of an edited model: `{"quant_method": "formulary", "edits": [...]}`.

    `"sharded": true` beside them says that the weights are in several files, named by an index (what a streamed run writes).
    """

    def __init__(self, edits=(), sharded=False, **unknown):
        unknown.pop("quant_method", None)
        if unknown:
            raise ValueError(f"config.json: quantization_config has unknown fields {sorted(unknown)}")
        self.quant_method = "formulary"
        self.edits = list(edits)
        if sharded:
            self.sharded = True


class FormularyQuantizer(HfQuantizer):
    """Replays edits before the weights are loaded, from `WEIGHTS` or the files of `INDEX`, and keeps each tensor's stored dtype."""

    def __init__(self, quantization_config, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self._stored, self._asked = None, None

    def update_attn_implementation(self, config):
        """Called by transformers with the config before it looks for files: names ours, and the attention function if edited."""
        from formulary.contracts.attention import uses_attention
        from formulary.contracts.edits import check_entries

        check_entries(self.quantization_config.edits)
        self._stored = getattr(config, "dtype", None)
        config.transformers_weights = INDEX if getattr(self.quantization_config, "sharded", False) else WEIGHTS
        if uses_attention(self.quantization_config.edits):
            config._attn_implementation = "formulary"
        return config

    def update_dtype(self, dtype):
        self._asked = dtype
        return dtype

    def get_new_dtype(self, converter, param, dtype):
        """None keeps a tensor's dtype as stored; a dtype asked for that differs from the config's casts the float tensors."""
        if self._asked is None or self._asked == self._stored:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model, **kwargs):
        from formulary.contracts.edits import replay

        with torch.device("meta"):
            replay(model, self.quantization_config.edits)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        for config in (self.quantization_config, model.config.quantization_config):
            vars(config).pop("sharded", None)  # it is about the files, and saving again writes others
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


def register() -> None:
    """Make "formulary" known to transformers' loader; calling it again changes nothing."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("formulary", FormularyConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault("formulary", FormularyQuantizer)
