"""The layers of a plain loop on four devices that do not exist; tests/test_plain_loops.py starts it.

    python tests/fake_devices.py finetune_pp_peft lora [unmoved]

FakeTensorMode computes shapes and devices, and no values. It raises where two operands lie on different devices: with
`unmoved`, where no input follows its layer. What cannot be tried in this way: the backward, for which autograd asks a
real device, autocast, and a tied head, because tensors without an address cannot be tied.
"""

import importlib
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_collator


class FakeBackend(backend_registration._DummyBackendModule):
    def device_count(self) -> int:
        return 4

    def get_amp_supported_dtype(self) -> list:
        return [torch.bfloat16]


def fake_attention(query, key, value, *_) -> torch.Tensor:
    """Stands for the kernel, which no fake device has: its operands must lie on one device."""
    num_groups = query.shape[1] // key.shape[1]
    return (query + (key * value).repeat_interleave(num_groups, 1)).transpose(1, 2)


def place(model: torch.nn.Module, device_map: dict) -> None:
    """Puts an empty tensor in place of each weight, on its device."""
    for name, module in model.named_modules():
        device = None
        for key in device_map:
            if f"{name}.".startswith(f"{key}."):
                device = device_map[key]
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if isinstance(tensor, torch.nn.Parameter):
                    empty = torch.empty(tensor.shape, device=device)
                    tensors[key] = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
                elif tensor is not None:
                    tensors[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def main() -> None:
    script = importlib.import_module(sys.argv[1])
    mode = sys.argv[2]
    backend_registration._setup_privateuseone_for_python_backend("gpu", FakeBackend())
    data_collator.has_varlen_kernel = lambda *_: True
    data_collator.varlen_attention = fake_attention
    args = script.Arguments(use_cpu=True, bf16="False")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    devices = [torch.device("gpu", i) for i in range(4)]
    device_map = script.make_device_map(config, devices)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    data_collator.attend_inside_documents(base)
    model = base
    if mode != "full":
        args.peft_mode = mode
        model = script.add_adapter(args, base)
    ids = torch.arange(5, 25)
    rows = [{"input_ids": ids[:8], "labels": ids[:8]}, {"input_ids": ids[8:], "labels": ids[8:]}]
    batch = data_collator.DataCollator(args.padding_free)(rows)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_tensors, torch.no_grad():
        for name, value in batch.items():
            if isinstance(value, torch.Tensor):
                batch[name] = fake_tensors.from_tensor(value)
        place(base, device_map)
        if "unmoved" not in sys.argv:
            script.move_inputs_to_layers(base, device_map)
        loss = script.forward(args, model, script.loss_in_chunks, batch, devices[0])
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        script.make_optimizer(args, model).step()
        used = sorted({str(parameter.device) for parameter in model.parameters()})
    print(f"loss on {loss.device}, norm on {norm.device}, weights on {', '.join(used)}")


if __name__ == "__main__":
    main()
