"""Runs a training script and writes what its gradients and weights do in the first steps; tools/doctor.py starts it.

    python tools/watch_weights.py outputs/watched finetune_pp_peft.py --max_steps 3

Each rank writes `outputs/watched.<rank>` (JSON) when the third optimizer step is about to update:

    gradients       for each of the first two steps, the largest absolute gradient of every trained tensor, by name;
                    with sharding, of this rank's shard
    before, after   a checksum of every tensor's local data, before the first update and behind the second
    frozen          names of the tensors that are not trained

The script runs unchanged. It is watched through hooks that PyTorch documents for all modules and all optimizers.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS = 2  # whose gradients are kept; lora_A gets its first one in step 2, because lora_B begins as zero


def local_data(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter or gradient: its shard under FSDP2 (a DTensor) and ZeRO-3 (ds_tensor)."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if hasattr(tensor, "ds_tensor"):
        tensor = tensor.ds_tensor
    return tensor.detach()


def checksum(tensor: torch.Tensor) -> float:
    """A number that changes when a value changes."""
    data = local_data(tensor).flatten()
    if not data.is_floating_point():  # 4-bit weights
        data = data.view(torch.uint8)
    data = data.double()
    return float(data.sum()) + float(data.square().sum())


class Watch:
    """Follows the forwards and the updates of the first steps.

    The models are found as they compute: a module that is called while its parameters are not known is the outermost
    of a forward. There may be several, such as a decoder and an output layer that a script calls by itself.
    """

    def __init__(self, output: str):
        self.output = output
        self.models = []
        self.known_modules = set()  # ids of all modules inside of self.models
        self.others = {}  # parameters that are trained and stand in no model that was called, by a made-up name
        self.uses_deepspeed = False
        self.gradients = [{}]
        self.before = {}
        self.was_updated = False  # in the step that goes on

    def before_forward(self, module: torch.nn.Module, inputs) -> None:
        if not torch.is_grad_enabled():  # an evaluation, or a check
            return
        if id(module) not in self.known_modules:
            self.add_model(module)
        if self.was_updated:  # a forward behind an update begins the next step
            self.was_updated = False
            self.gradients.append({})

    def add_model(self, model: torch.nn.Module) -> None:
        self.models.append(model)
        for module in model.modules():
            self.known_modules.add(id(module))
        if type(model).__name__ == "DeepSpeedEngine":
            self.uses_deepspeed = True
        for name, parameter in model.named_parameters():
            # DeepSpeed's optimizer has flat copies. The gradient of a tensor with its name is seen as it is computed.
            if parameter.requires_grad and self.uses_deepspeed:
                parameter.register_hook(lambda gradient, name=name: self.note_gradient(name, gradient))

    def note_gradient(self, name: str, gradient: torch.Tensor) -> None:
        data = local_data(gradient)
        largest = 0.0
        if data.numel() > 0:
            largest = float(data.abs().max())
        step = self.gradients[-1]
        step[name] = max(step.get(name, 0.0), largest)

    def before_update(self, optimizer: torch.optim.Optimizer, *_) -> None:
        if self.was_updated:  # DeepSpeed updates each group of parameters by a call of its own
            return
        self.was_updated = True
        if not self.uses_deepspeed:
            self.note_gradients_of(optimizer)
        if len(self.gradients) == 1:
            self.before = self.take_checksums()
        if len(self.gradients) == NUM_STEPS + 1:
            self.write()

    def note_gradients_of(self, optimizer: torch.optim.Optimizer) -> None:
        # Names are looked up here and not in the forward: FSDP2 holds some parameters whole there, as other tensors.
        names = {}
        for model in self.models:
            for name, parameter in model.named_parameters():
                names.setdefault(id(parameter), name)
        for name, parameter in self.others.items():
            names[id(parameter)] = name
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:  # an output layer whose weight is used without calling the layer
                    name = f"tensor {len(self.others) + 1} without a name, {list(parameter.shape)}"
                    names[id(parameter)] = name
                    self.others[name] = parameter
                if parameter.grad is not None:
                    self.note_gradient(names[id(parameter)], parameter.grad)

    def take_checksums(self) -> dict[str, float]:
        checksums = {}
        for name, parameter in self.others.items():
            checksums[name] = checksum(parameter)
        for model in self.models:
            for name, parameter in model.named_parameters():
                checksums[name] = checksum(parameter)
        return checksums

    def write(self) -> None:
        frozen = []
        for model in self.models:
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    frozen.append(name)
        found = {
            "gradients": self.gradients[:NUM_STEPS],
            "before": self.before,
            "after": self.take_checksums(),
            "frozen": frozen,
        }
        rank = 0
        if dist.is_initialized():
            rank = dist.get_rank()
        Path(f"{self.output}.{rank}").write_text(json.dumps(found))


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("error: name the file to write, then the training script and its flags")
    watch = Watch(sys.argv[1])
    register_module_forward_pre_hook(watch.before_forward)
    register_optimizer_step_pre_hook(watch.before_update)
    script = str(ROOT / os.path.basename(sys.argv[2]))
    sys.argv = [script, *sys.argv[3:]]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
