"""MiniLM's sentences per second: deepspeed-inference+llm-int8 beside OpenVINO, ONNX Runtime and PyTorch.

    python benchmarks/encoder.py            # two tables and plots in docs/benchmarks
    python benchmarks/encoder.py --rounds 7

64 passages of the King James Bible, padded and cut to 128 tokens, and 64 verses of natural, mixed length, padded to the longest;
from ids to mean-pooled embeddings. NNCF calibrates on 128 other passages.
"""

import tempfile
from pathlib import Path

import side_by_side

OURS = "formulary int8"


def texts(mixed: bool, skip: int = 0, count: int = 64) -> list[str]:
    from formulary import lab

    verses = lab.kjv()[skip:]
    return verses[: 7 * count : 7] if mixed else [" ".join(verses[8 * i : 8 * i + 8]) for i in range(count)]


def batch(tokenizer, chosen: list[str], mixed: bool):
    padding = {"padding": True} if mixed else {"padding": "max_length"}
    return tokenizer(chosen, truncation=True, max_length=128, return_tensors="pt", **padding)


def pooled(states, mask):
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


class Setting:
    """The model, the measured batch and the embeddings that fp32 gives."""

    def __init__(self, mixed: bool):
        import torch

        from formulary import lab

        torch.set_num_threads(1)
        self.torch, self.mixed = torch, mixed
        self.model, self.tokenizer = lab.minilm()
        self.batch = batch(self.tokenizer, texts(mixed), mixed)
        with torch.inference_mode():
            self.wanted = pooled(self.model(**self.batch).last_hidden_state, self.batch["attention_mask"])

    def arm(self, embed):
        """(work, facts) of a function batch -> embeddings."""
        seen = embed(self.batch).float()
        cosine = self.torch.cosine_similarity(seen, self.wanted).mean()
        return (lambda: embed(self.batch)), {"cosine": float(cosine)}

    def torch_arm(self, model):
        def embed(batch):
            with self.torch.inference_mode():
                return pooled(model(**batch).last_hidden_state.float(), batch["attention_mask"])

        return self.arm(embed)

    def exported(self, directory: str) -> str:
        """The model as ONNX, its states as output."""
        torch, model = self.torch, self.model

        class States(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, input_ids, attention_mask, token_type_ids):
                return self.inner(
                    input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
                ).last_hidden_state

        names = ["input_ids", "attention_mask", "token_type_ids"]
        path = str(Path(directory) / "model.onnx")
        model.set_attn_implementation("eager")
        axes = {name: {0: "batch", 1: "length"} for name in [*names, "states"]}
        torch.onnx.export(
            States().eval(), tuple(self.batch[name] for name in names), path, input_names=names, output_names=["states"],
            dynamic_axes=axes, dynamo=False, opset_version=17,
        )  # fmt: skip
        return path


def torch_fp32(mixed):
    setting = Setting(mixed)
    return setting.torch_arm(setting.model)


def torch_bf16(mixed):
    setting = Setting(mixed)
    return setting.torch_arm(setting.model.bfloat16())


def formulary_int8(mixed):
    from formulary.papers.inference.deepspeed_inference import DeepSpeedInference
    from formulary.papers.quantization.llm_int8 import LLMInt8

    setting = Setting(mixed)
    model, _ = DeepSpeedInference().apply(setting.model)
    model, _ = LLMInt8().apply(model)
    return setting.torch_arm(model)


def onnxruntime_arm(mixed, quantized: bool):
    import onnxruntime as ort

    setting = Setting(mixed)
    with tempfile.TemporaryDirectory() as directory:
        path = setting.exported(directory)
        if quantized:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(path, path + ".int8", weight_type=QuantType.QInt8)
            path += ".int8"
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def embed(batch):
        states = session.run(None, {name: batch[name].numpy() for name in batch})[0]
        return pooled(setting.torch.from_numpy(states), batch["attention_mask"])

    return setting.arm(embed)


def openvino_arm(mixed, precision: str):
    import openvino as ov

    setting = Setting(mixed)
    with tempfile.TemporaryDirectory() as directory:
        model = ov.Core().read_model(setting.exported(directory))
        if precision == "int8":
            import nncf

            chosen = texts(False, skip=4000, count=128)
            rows = [{k: v.numpy() for k, v in batch(setting.tokenizer, [text], False).items()} for text in chosen]
            model = nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER)
        hint = "bf16" if precision == "int8" else precision  # what is not int8 runs in bf16, its fastest
        compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": hint})
    request = compiled.create_infer_request()

    def embed(batch):
        states = request.infer({name: batch[name].numpy() for name in batch})[0]
        return pooled(setting.torch.from_numpy(states.copy()), batch["attention_mask"])

    return setting.arm(embed)


ARMS = {
    OURS: formulary_int8,
    "PyTorch fp32": torch_fp32,
    "PyTorch bf16": torch_bf16,
    "ONNX Runtime fp32": lambda mixed: onnxruntime_arm(mixed, False),
    "ONNX Runtime int8": lambda mixed: onnxruntime_arm(mixed, True),
    "OpenVINO fp32": lambda mixed: openvino_arm(mixed, "f32"),
    "OpenVINO bf16": lambda mixed: openvino_arm(mixed, "bf16"),
    "OpenVINO int8 (NNCF)": lambda mixed: openvino_arm(mixed, "int8"),
}


SECTIONS = {
    "padded": side_by_side.Section("Padded to 128 tokens", 64, "sentences"),
    "mixed": side_by_side.Section("Natural, mixed length, padded to the longest", 64, "sentences"),
}


def main() -> None:
    arms = {name: lambda lengths, arm=arm: arm(lengths == "mixed") for name, arm in ARMS.items()}
    side_by_side.run(__file__, __doc__, arms, (OURS,), SECTIONS, facts={"cosine": "cosine to fp32"}, rounds=15)


if __name__ == "__main__":
    main()
