"""One run is one folder: what it holds, the same run after a kill, divergence, adversarial training, errors."""

import csv
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from infovae_fast import RBF, InfoVAE, load_data
from infovae_fast.cli import load_model
from infovae_fast.cuda_graph import CudaGraph
from infovae_fast.data import to_unit
from infovae_fast.files import whole, write_bytes
from infovae_fast.training import (
    ImageDataModule,
    InfoVAETraining,
    ShuffledBatches,
    TrainingDiverged,
    can_fuse,
    lay_out,
    read_run,
    run_data,
    train,
)

SMALL = {
    "train_size": 60,
    "batch_size": 20,
    "latent_dim": 2,
    "encoder": {"name": "mlp", "hidden": [16]},
    "progress": False,
}


def weights(folder):
    return InfoVAE.from_pretrained(Path(folder) / "model").state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def curve(folder, column):
    """A column of metrics.csv by epoch, over all starts of the run."""
    values = {}
    for path in sorted(Path(folder).glob("logs/version_*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            if row.get(column):
                values[int(row["epoch"])] = float(row[column])
    return values


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for networks this small a second one only waits
    yield
    torch.set_num_threads(threads)


def test_a_run_folder(tmp_path, capsys):
    folder = train(preset="mmd_vae", epochs=4, seed=3, out=str(tmp_path / "run"), **SMALL)
    assert "seed 3" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 3 and config["preset"] == "mmd_vae" and config["latent_dim"] == 2
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert {p.name for p in (folder / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert list(folder.glob("logs/version_0/events.out.tfevents*"))
    for column in ("train_loss", "train_mmd", "train_kl", "train_reconstruction", "val_loss", "val_mmd"):
        values = curve(folder, column)
        assert list(values) == [0, 1, 2, 3] and all(map(math.isfinite, values.values()))
    assert not list(folder.rglob(".*"))  # no temporary file is left


def test_training_learns(tmp_path):
    """The ELBO of a trained model, reconstruction and KL together, beats the best constant image by far."""
    data = load_data("digits")
    x = to_unit(data.train_images, data.levels)
    mean = x.mean(0)
    constant = -(x * mean.clamp(1e-6).log() + (1 - x) * (1 - mean).clamp(1e-6).log()).sum((1, 2, 3)).mean().item()
    folder = train(preset="elbo", epochs=40, evaluate_every=40, lr=3e-3, out=str(tmp_path / "run"), progress=False)
    assert curve(folder, "train_loss")[39] < constant - 1.5
    assert curve(folder, "val_loss")[39] < constant - 1.5


@pytest.mark.parametrize("preset", ["elbo", "beta_vae", "stein_vae", "aae", "unregularized"])
def test_every_preset_trains(tmp_path, preset):
    folder = train(preset=preset, epochs=2, out=str(tmp_path / "run"), **SMALL)
    values = curve(folder, "train_reconstruction")
    assert values[1] < values[0]


@pytest.mark.parametrize("preset", ["mmd_vae", "aae"])
def test_a_run_that_was_interrupted_is_the_same_run(tmp_path, preset, monkeypatch):
    """Stopped in the middle of an epoch and resumed: bit for bit the weights and curves of the run that was not."""
    options = SMALL | {"preset": preset, "epochs": 5, "binarize": "dynamic"}
    train(out=str(tmp_path / "whole"), **options)
    step = InfoVAETraining.training_step

    def interrupted(self, x, index):
        if self.current_epoch == 3 and index == 1:
            raise RuntimeError("power failure")
        return step(self, x, index)

    monkeypatch.setattr(InfoVAETraining, "training_step", interrupted)
    with pytest.raises(RuntimeError, match="power failure"):
        train(out=str(tmp_path / "parts"), **options)
    assert not (tmp_path / "parts" / "model").exists()
    monkeypatch.undo()
    train(resume=str(tmp_path / "parts"), progress=False)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert curve(tmp_path / "whole", "val_loss") == curve(tmp_path / "parts", "val_loss")
    assert curve(tmp_path / "whole", "train_loss") == curve(tmp_path / "parts", "train_loss")


def test_weights_grow_in_the_warm_up(tmp_path, monkeypatch):
    """3 steps an epoch, of 2 epochs; resumed they go on, and the rest of the run has all of them."""
    seen, loss = [], InfoVAE.loss

    def watched(self, x):
        strength = self.objective.strength
        seen.append((self.training, 1.0 if strength is None else strength.item()))
        return loss(self, x)

    monkeypatch.setattr(InfoVAE, "loss", watched)
    options = {"preset": "elbo", "warmup_epochs": 2.0} | SMALL
    folder = train(out=str(tmp_path / "run"), epochs=1, **options)
    train(resume=str(folder), epochs=3)
    trained = [strength for training, strength in seen if training]
    assert trained == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1, 1])
    assert all(strength == 1 for training, strength in seen if not training)
    assert InfoVAE.from_pretrained(folder / "model").objective.strength is None
    with pytest.raises(ValueError, match="warmup_epochs: got 0; accepted: a positive number"):
        train(out=str(tmp_path / "other"), **options | {"warmup_epochs": 0})


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(lambda: torch.rand(1, 4, 4), None)


def test_batches_may_have_labels():
    images = torch.rand(8, 1, 4, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(8)), batch_size=4)
    module = InfoVAETraining(InfoVAE.from_config((1, 4, 4), 2))
    before = module.model.encoder[-1].weight.clone()
    strengths: list = []
    module.model.objective.register_forward_pre_hook(lambda objective, _: strengths.append(objective.strength))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet).fit(module, loader, loader)
    assert not torch.equal(before, module.model.encoder[-1].weight) and strengths == [None] * 6
    warm = InfoVAETraining(module.model, warmup_epochs=1)
    for _ in range(2):  # each fit has its own
        strengths.clear()
        pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet).fit(warm, loader)
        assert module.model.objective.strength is None and len(strengths) == 2 and strengths[1] == 1
    endless = pl.Trainer(max_steps=2, accelerator="cpu", enable_model_summary=False, **quiet)
    with pytest.raises(ValueError, match="warmup_epochs: got a loader without a length"):
        endless.fit(warm, torch.utils.data.DataLoader(Endless(), batch_size=4))


class Pretended(CudaGraph):
    """On the CPU: what a replay writes to the memory of a recording, and that it assigns to no parameter."""

    def __call__(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls <= self.eager:
            return self.run(x)
        parameters = list(self.run.__self__.model.parameters())
        kept = [p.grad for p in parameters]
        terms, gradients = self.run(x)
        if self.calls == self.eager + 1:
            self.recorded = gradients
            return terms, gradients
        for p, old in zip(parameters, kept, strict=True):
            p.grad = old
        for memory, new in zip(self.recorded, gradients, strict=True):
            memory.copy_(new)
        return terms, self.recorded


def test_a_recorded_step_trains_on_after_validation(tmp_path, monkeypatch):
    """Which lets go of the gradients, in every epoch: the weights are those without a graph."""
    options = SMALL | {"preset": "mmd_vae", "epochs": 4, "binarize": "dynamic"}
    plain = train(out=str(tmp_path / "plain"), **options)
    monkeypatch.setattr("infovae_fast.training.CudaGraph", Pretended)
    monkeypatch.setattr(InfoVAETraining, "_graph_for", lambda self, x: self._graph)
    graph = train(out=str(tmp_path / "graph"), **options)
    assert same(weights(plain), weights(graph))
    assert curve(plain, "train_loss") == curve(graph, "train_loss")


def test_killed_and_resumed_from_the_command_line(tmp_path):
    """kill -9 at any moment: the checkpoint is whole, and --resume ends with the weights of an undisturbed run."""
    options = [f"--{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in SMALL.items() if k != "progress"]
    command = [sys.executable, "-m", "infovae_fast.cli", "train", "--progress=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    epochs = "--epochs=60"
    process = subprocess.Popen([*command, *options, epochs, f"--out={tmp_path / 'run'}"], env=environment)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = torch.load(checkpoint, weights_only=True)["epoch"]
    assert not (tmp_path / "run" / "model").exists() and stopped_at < 59
    subprocess.run([*command, f"--resume={tmp_path / 'run'}"], env=environment, check=True)
    train(out=str(tmp_path / "whole"), epochs=60, **SMALL)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_mixed_precision(tmp_path, monkeypatch):
    """Products in bfloat16; weights, z and the loss in float32. A run resumes as it began, also one of before."""
    seen = {}
    loss = InfoVAE.loss

    def watched(self, x):
        terms, posterior = loss(self, x), self.encode(x)
        seen.update(hidden=self.encoder[1](x.flatten(1)).dtype, z=posterior.mu.dtype, loss=terms.loss.dtype)
        if terms.loss.requires_grad:
            terms.loss.register_hook(lambda _: seen.update(backward=torch.is_autocast_enabled("cpu")))
        return terms

    monkeypatch.setattr(InfoVAE, "loss", watched)
    half = {"precision": "bf16-mixed", "out": str(tmp_path / "half"), **SMALL}
    folder = train(epochs=2, **half)
    assert seen == {"hidden": torch.bfloat16, "z": torch.float32, "loss": torch.float32, "backward": False}
    assert all(not t.is_floating_point() or t.dtype == torch.float32 for t in weights(folder).values())
    whole = train(epochs=3, **half | {"out": str(tmp_path / "whole")})
    assert same(weights(train(resume=str(folder), epochs=3, progress=False)), weights(whole))

    exact = train(epochs=1, **half | {"precision": "32-true", "out": str(tmp_path / "exact")})
    config = json.loads((exact / "config.json").read_text())
    del config["precision"], config["cuda_graph"]
    (exact / "config.json").write_text(json.dumps(config))
    train(resume=str(exact), epochs=2, progress=False)
    assert json.loads((exact / "config.json").read_text())["precision"] == "32-true" and seen["hidden"] == torch.float32


def test_a_finished_run_can_be_made_longer(tmp_path):
    train(out=str(tmp_path / "a"), epochs=2, **SMALL)
    train(resume=str(tmp_path / "a"), epochs=4, progress=False)
    train(out=str(tmp_path / "b"), epochs=4, **SMALL)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_seeds(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(out=str(tmp_path / name), epochs=1, seed=seed, **SMALL)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("preset", ["elbo", "mmd_vae"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, preset, monkeypatch):
    """The message names the step and the last good checkpoint, which holds finite weights."""
    loss = InfoVAE.loss

    def poisoned(self, x):
        if self.training and poisoned.calls == 7:  # 3 steps an epoch: in the third
            torch.nn.init.constant_(self.encoder[-1].bias, math.nan)
        poisoned.calls += self.training
        return loss(self, x)

    poisoned.calls = 0
    monkeypatch.setattr(InfoVAE, "loss", poisoned)
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=r"diverged at step 7 \(epoch 2\).*Last good checkpoint: .*last\.ckpt"):
        train(preset=preset, epochs=5, out=str(out), **SMALL)
    state = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1 and all(t.isfinite().all() for t in state["state_dict"].values())


def test_the_critic_has_its_own_optimiser():
    data = load_data("digits", train_size=20)
    model = InfoVAE.from_config(data.shape, 2, objective="aae")
    module = InfoVAETraining(model, lr=0.5)
    main, critic = module.configure_optimizers()
    ids = [{id(p) for group in o.param_groups for p in group["params"]} for o in (main, critic)]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == len(list(model.parameters()))
    assert ids[1] == {id(p) for p in model.objective.divergence.critic.parameters()}


def test_the_encoder_meets_the_prior_through_a_critic(tmp_path):
    """Adversarial training pulls q(z) to the prior: MMD well below that of the same model without a divergence."""
    options = {"epochs": 60, "evaluate_every": 60, "latent_dim": 2, "progress": False, "train_size": 400}
    distance = {}
    for preset in ("unregularized", "aae"):
        train(preset=preset, out=str(tmp_path / preset), **options)
        from infovae_fast.cli import evaluate

        distance[preset] = evaluate(str(tmp_path / preset), n_samples=1)["train"]["full_set_mmd"]
    assert distance["aae"] < distance["unregularized"] / 5


def test_batches():
    data = load_data("digits", train_size=105)
    module = ImageDataModule(data, 20, seed=1)
    loader = module.train_dataloader()
    batches = list(loader)
    assert [len(b) for b in batches] == [20] * 5 and batches[0].dtype == torch.float32
    assert batches[0].min() >= 0 and batches[0].max() <= 1
    module.TEST_BATCH = 50
    assert sorted(len(b) for b in module.val_dataloader()) == [45] * 8
    assert len(torch.cat(list(module.val_dataloader()))) == 360
    assert [len(b) for b in ImageDataModule(data, 500).train_dataloader()] == [105]
    a, b = ShuffledBatches(105, 20, seed=1), ShuffledBatches(105, 20, seed=1)
    first = torch.cat(list(a))
    assert len(first.unique()) == 100 and torch.equal(first, torch.cat(list(b)))
    a.set_epoch(1)
    assert not torch.equal(first, torch.cat(list(a)))


def test_validation_leaves_the_noise_of_training_alone():
    data = load_data("digits", train_size=20)
    module = InfoVAETraining(InfoVAE.from_config(data.shape, 2))
    module.on_validation_epoch_start()
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    module.validation_step(to_unit(data.test_images[:10], data.levels), 0)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("likelihood", ["categorical", "discretized_logistic_mixture"])
def test_levels_are_those_of_the_images(tmp_path, capsys, likelihood):
    for binarize, levels in ((None, 17), ("static", 2), ("dynamic", 2)):
        folder = tmp_path / str(binarize)
        train(out=str(folder), epochs=1, likelihood=likelihood, binarize=binarize, **SMALL)
        assert json.loads((folder / "config.json").read_text())["likelihood"] == {"name": likelihood, "levels": levels}
    capsys.readouterr()
    folder = train(out=str(tmp_path / "x"), epochs=1, likelihood={"name": likelihood, "levels": 5}, **SMALL)
    assert "likelihood: of 17 levels, as the images have" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["likelihood"]["levels"] == 17


def test_settings_that_never_run_do_not_block_the_folder(tmp_path):
    folder = str(tmp_path / "run")
    with pytest.raises(ValueError, match="learning rate"):
        train(preset="aae", objective={"critic_lr": -1.0}, out=folder, epochs=1, **SMALL)
    train(out=folder, epochs=1, **SMALL)


def test_refusals(tmp_path):
    folder = train(out=str(tmp_path / "run"), epochs=1, **SMALL)
    with pytest.raises(ValueError, match=r"already holds a run: continue it with --resume"):
        train(out=str(folder))
    with pytest.raises(ValueError, match=r"only --epochs and --progress may be given with it, got lr, seed"):
        train(resume=str(folder), lr=0.1, seed=5)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing; expected the folder of a run"):
        train(resume=str(tmp_path / "nothing"))
    for text, reason in (("{", "is damaged"), ("{}", "has no key 'preset'")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            train(resume=str(folder))
    for name, value in (("epochs", 0), ("evaluate_every", 0), ("batch_size", 1)):
        with pytest.raises(ValueError, match=rf"{name}: got {value}; accepted: an integer, {value + 1} or more"):
            train(out=str(tmp_path / "other"), **{name: value})
        assert not (tmp_path / "other").exists()
    for options, reason in (
        ({"preset": "vae"}, "objective: got 'vae'; accepted: 'elbo'"),
        ({"objective": {"name": "elbo"}}, "objective: got name, which other options give; accepted: once"),
        ({"objective": {"alpha": 0.5}, "alpha": 0.3}, "objective: got alpha, which other options give"),
        ({"data": "minst"}, "mnist"),
        ({"binarize": "often"}, "often"),
        ({"train_size": 10**6}, "train_size"),
        ({"alpha": 0.0, "lambda_": 0.5}, "a negative weight rewards mismatch"),
        ({"likelihood": "poisson"}, "poisson"),
        ({"precision": "16"}, "precision: got '16'; accepted: '32-true', 'bf16-mixed'"),
        ({"lr": -1.0}, "lr: got -1.0; accepted: a positive number"),
        ({"lr": math.inf}, "lr: got inf; accepted: a positive number"),
        ({"gradient_clip": 0.0}, "gradient_clip: got 0.0; accepted: a positive number"),
        ({"objective": {"kernel": RBF()}}, r"objective: got .*RBF.* accepted: plain values"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            train(out=str(tmp_path / "other"), **options)
        assert not (tmp_path / "other").exists()


def test_settings_that_do_not_fit_each_other_are_no_divergence_and_leave_no_run(tmp_path):
    out = str(tmp_path / "run")
    for options, reason in (
        ({"preset": "elbo", "prior": "uniform"}, "alpha=0 weighs the KL term, but it is not defined here"),
        ({"preset": "mmd_vae", "train_size": 1}, "needs two points"),
    ):
        with pytest.raises(ValueError, match=reason):
            train(out=out, epochs=1, **SMALL | options)
    assert not list((tmp_path / "run" / "logs").glob("*"))  # which the next run's curves would have in them
    images = (np.arange(9 * 16).reshape(9, 1, 4, 4) % 7 * 30).astype(np.uint8)  # 8 for training, 1 for testing
    np.save(tmp_path / "few.npy", images)
    with pytest.raises(ValueError, match=r"few\.npy: got a test set of one image; accepted: two or more"):
        train(str(tmp_path / "few.npy"), epochs=1, out=out, **SMALL | {"train_size": None, "batch_size": 4})
    train(out=out, epochs=1, **SMALL)


def test_settings_may_be_numbers_of_numpy(tmp_path):
    options = {"latent_dim": np.int64(2), "lr": np.float32(0.25), "objective": {"lambda_": np.float64(3)}}
    folder = train(out=str(tmp_path / "run"), epochs=1, **SMALL | options)
    config = json.loads((folder / "config.json").read_text())
    assert (config["latent_dim"], config["lr"], config["objective"]) == (2, 0.25, {"lambda_": 3.0})


def test_a_config_may_hold_anything(tmp_path):
    folder = train(out=str(tmp_path / "run"), epochs=1, **SMALL)
    text = (folder / "config.json").read_text()
    wrong = {"evaluate_every": 1.5, "lr": "x", "batch_size": "100", "gradient_clip": "a", "preset": ["a"], "data": 5}
    wrong |= {"objective": "mmd", "cuda_graph": "maybe", "binarize": "foo", "seed": -1, "encoder": 3, "alpha": math.nan}
    for name, value in wrong.items():
        (folder / "config.json").write_text(json.dumps(json.loads(text) | {name: value}))
        with pytest.raises(ValueError, match=rf"{name}: got .*; accepted: "):
            train(resume=str(folder), epochs=2)


def test_a_run_knows_its_data_from_everywhere_and_old_metrics_go(tmp_path, monkeypatch):
    np.save(tmp_path / "few.npy", (np.arange(40 * 16).reshape(40, 1, 4, 4) % 7 * 30).astype(np.uint8))
    monkeypatch.chdir(tmp_path)
    folder = train("few.npy", out="run", epochs=1, **SMALL | {"train_size": None, "batch_size": 4}).resolve()
    monkeypatch.chdir("/")
    assert len(run_data(read_run(folder)).train_images) == 36
    (folder / "metrics.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    train("few.npy", resume=str(folder), epochs=2)
    assert not (folder / "metrics.json").exists()
    (tmp_path / "blob").write_bytes((tmp_path / "few.npy").read_bytes())
    (tmp_path / "link.npy").symlink_to("blob")  # its own name tells what it is
    train("link.npy", out="other", epochs=1, **SMALL | {"train_size": None, "batch_size": 4})
    with pytest.raises(ValueError, match="'mnst' is unknown"):
        train("mnst", out="none")


@pytest.mark.parametrize("preset", ["elbo", "mmd_vae"])
def test_a_last_step_that_diverges_leaves_no_model(tmp_path, preset):
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match="none was written yet"):
        train(preset=preset, epochs=1, lr=1e30, out=str(out), **SMALL | {"batch_size": 60})
    assert not (out / "model").exists() and not (out / "checkpoints" / "last.ckpt").exists()


def raises(*inputs, **options):
    raise RuntimeError("no memory")


def test_resuming_asks_for_epochs_to_come(tmp_path, monkeypatch):
    folder = train(out=str(tmp_path / "run"), epochs=2, **SMALL)
    with pytest.raises(ValueError, match=r"epochs: got 1; accepted: 2 or more, as .* has done so many"):
        train(resume=str(folder), epochs=1)
    assert json.loads((folder / "config.json").read_text())["epochs"] == 2
    step = InfoVAETraining.training_step

    def interrupted(self, x, index):
        if self.current_epoch == 3:
            raise RuntimeError("power failure")
        step(self, x, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr("lightning.pytorch.Trainer.fit", raises)
        train(resume=str(folder), epochs=3, progress=False)
    load_model(str(folder))  # nothing has happened to it
    monkeypatch.setattr(InfoVAETraining, "training_step", interrupted)
    with pytest.raises(RuntimeError, match="power failure"):
        train(resume=str(folder), epochs=100, progress=False)  # 100, what a new run has
    with pytest.raises(FileNotFoundError, match="has not finished"):
        load_model(str(folder))
    monkeypatch.undo()
    assert json.loads((folder / "config.json").read_text())["epochs"] == 100
    train(resume=str(folder), epochs=4, progress=False)
    load_model(str(folder))


def test_a_new_run_does_not_begin_where_another_was(tmp_path):
    folder = train(out=str(tmp_path / "run"), epochs=1, **SMALL)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        train(out=str(folder), epochs=1, seed=7, **SMALL)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no checkpoint at all" * 99, None])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    folder = train(out=str(tmp_path / "run"), epochs=1, **SMALL)
    if content is None:  # numbers in the middle are others
        content = bytearray((folder / "checkpoints" / "last.ckpt").read_bytes())
        content[len(content) // 2] ^= 255
    (folder / "checkpoints" / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*: delete it to start the run again"):
        train(resume=str(folder), epochs=2, progress=False)
    (folder / "checkpoints" / "last.ckpt").unlink()
    train(resume=str(folder), epochs=1, progress=False)
    whole = train(out=str(tmp_path / "whole"), epochs=1, **SMALL)
    assert same(weights(folder), weights(whole))


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    folder = train(out=str(tmp_path / "run"), epochs=1, **SMALL)
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*: the last checkpoint stays as it was: .*last\.ckpt"):
        train(resume=str(folder), epochs=2, progress=False)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before


def test_what_a_killed_run_left_unfinished_goes_and_checkpoints_pass_no_other_folder(tmp_path, monkeypatch):
    folder = train(out=str(tmp_path / "run"), epochs=1, **SMALL)
    (folder / "checkpoints" / ".last.ckpt.12345").write_bytes(b"half of it")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    train(resume=str(folder), epochs=2, progress=False)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"before")
    with pytest.raises(RuntimeError), whole(path) as temporary:
        temporary.write_bytes(b"half of it")
        raise RuntimeError
    assert [p.name for p in path.parent.iterdir()] == ["file"] and path.read_bytes() == b"before"


def test_weights_that_are_part_of_a_larger_tensor_are_trained_as_others():
    large = torch.randn(16, 3, 8, 8)
    before, results = large.clone(), []
    for first in (large[:, :1], large[:, :1].clone()):
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(1, 16, 8)
        layer.weight = torch.nn.Parameter(first)
        encoder = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(16, 4))
        decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Unflatten(1, (1, 8, 8)))
        module = InfoVAETraining(InfoVAE(encoder, decoder, 2))
        optimizer = module.configure_optimizers()
        assert can_fuse(list(module.parameters())) == first.is_contiguous() == optimizer.defaults["fused"]
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(1)
            module.model.loss(torch.full((5, 1, 8, 8), 0.5)).loss.backward()
            optimizer.step()
        results.append(layer.weight.detach().clone())
    assert torch.allclose(*results, atol=1e-6) and torch.equal(large[:, 1:], before[:, 1:])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_with_a_message_and_an_error(tmp_path, name):
    options = [f"--{k}={json.dumps(v) if isinstance(v, dict) else v}" for k, v in SMALL.items() if k != "progress"]
    command = [sys.executable, "-m", "infovae_fast.cli", "train", "--progress=false", *options, "--epochs=100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = tmp_path / "run"
    process = subprocess.Popen([*command, f"--out={run}"], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and f"interrupted; continue with --resume {run}" in said, said


def test_moments_are_laid_out_as_their_parameters():
    weight = torch.nn.Parameter(torch.randn(3, 2, 4, 5).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([weight])
    weight.sin().sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    before = {name: t.clone() for name, t in saved["state"][0].items()}
    saved["state"][0] = {name: t.clone(memory_format=torch.contiguous_format) for name, t in before.items()}
    optimizer.load_state_dict(saved)  # keeps the strides of what it is given
    assert optimizer.state[weight]["exp_avg"].stride() != weight.stride()
    lay_out(optimizer)
    for name, t in optimizer.state[weight].items():
        assert torch.equal(t, before[name]) and (t.ndim == 0 or t.stride() == weight.stride())
