"""Training with Lightning: one run is one folder.

    out/config.json           every argument of `train`, seed included: `--config out/config.json --out new` repeats it
    out/checkpoints/last.ckpt the state at the end of the last epoch; appears whole or not at all
    out/logs/version_K/       metrics.csv and TensorBoard events of the K-th start of the run
    out/model/                config.json and model.safetensors for `InfoVAE.from_pretrained`, once training is done

The randomness of an epoch (order of the examples, noise) depends on the seed and the epoch alone. A run that was killed
and resumed therefore gives the same weights as one that was not: on a CPU, by as many threads, bit for bit, on a GPU
but for the order of sums.
"""

import io
import json
import logging
import math
import os
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from infovae_fast.arguments import one_of
from infovae_fast.cuda_graph import CudaGraph
from infovae_fast.data import ImageData, binarize, load_data, to_unit
from infovae_fast.data_files import NAMED
from infovae_fast.divergences import AdversarialLoss
from infovae_fast.files import whole, write_bytes
from infovae_fast.models import InfoVAE
from infovae_fast.objective import PRESETS, Terms

Binarize = Literal["threshold", "static", "dynamic"] | None
Precision = Literal["32-true", "bf16-mixed"]


class TrainingDiverged(RuntimeError):
    """The loss is not a finite number any more; the message names the step and the last good checkpoint."""


def can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether an optimizer may take them by one kernel, many times as fast. It pairs numbers by their place in memory,
    where a part of a larger tensor does not match its gradient."""
    dense = all(torch.empty_like(p).stride() == p.stride() for p in parameters)
    return dense and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Gives moments the layout in memory of their parameters, which those of an older checkpoint may not have: fused
    steps pair numbers by their place."""
    for parameter, state in optimizer.state.items():
        for name, moment in state.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


class InfoVAETraining(pl.LightningModule):
    """Adam on the objective of an `InfoVAE`; an adversarial divergence has its critic updated before every step.

    For a `lightning.pytorch.Trainer`, with any loader of images, or of tuples that begin with them.

    Args:
        model: the model. Its critic, if it has one, has an optimiser of its own.
        lr: learning rate of Adam. gradient_clip: largest norm of the gradient, or None.
        seed: of the noise, see the module's text.
        dynamic_binarization: draw every batch anew from Bernoulli with the grey values as probabilities.
        warmup_epochs: the weights of the KL term and of the divergence grow linearly to what they are over so many
            epochs, from the first step on; validation has all of them. None: they are there at once.
        cuda_graph: on a GPU, loss and gradients as a CUDA graph, for models and divergences that do not look at
            numbers (see `CudaGraph`); not with a critic, nor where layers are computed again (`checkpoint_layers`).
    """

    def __init__(
        self,
        model: InfoVAE,
        *,
        lr: float = 1e-3,
        gradient_clip: float | None = None,
        seed: int = 0,
        dynamic_binarization: bool = False,
        warmup_epochs: float | None = None,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # the critic's step stands between the encoder's
        self.model, self.lr, self.gradient_clip, self.seed = model, lr, gradient_clip, seed
        self.dynamic_binarization, self.warmup_epochs = dynamic_binarization, warmup_epochs
        self._strength: Tensor | None
        self.register_buffer("_strength", None if warmup_epochs is None else torch.zeros(()), persistent=False)
        again = any(getattr(module, "checkpoint_layers", False) for module in model.modules())
        self.cuda_graph = cuda_graph and self._adversary is None and not again
        self._graph: CudaGraph[Any] | None = None
        self._validated = False

    @property
    def _adversary(self) -> AdversarialLoss | None:
        divergence = self.model.objective.divergence
        return divergence if isinstance(divergence, AdversarialLoss) else None

    def configure_optimizers(self) -> Any:
        adversary = self._adversary
        critic = set(adversary.critic.parameters()) if adversary is not None else set()
        parameters = [p for p in self.model.parameters() if p not in critic]
        adam = torch.optim.Adam(parameters, lr=self.lr, fused=can_fuse(parameters))
        return adam if adversary is None else [adam, adversary.critic_optimizer()]

    def on_train_start(self) -> None:
        self._graph = CudaGraph(self._gradients) if self.cuda_graph else None  # one of an earlier fit reads old memory
        if self.warmup_epochs is not None and not math.isfinite(self.trainer.num_training_batches):
            raise ValueError("warmup_epochs: got a loader without a length; accepted: one that has it, or None")
        for optimizer in self.trainer.optimizers:
            lay_out(optimizer)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(_stream(self.seed, self.current_epoch))
        self._means = _Means()

    def training_step(self, batch: Any, index: int) -> None:
        x = self._images(batch)
        if self._strength is not None and self.warmup_epochs is not None:
            epochs = self.current_epoch + (index + 1) / self.trainer.num_training_batches
            self._strength.fill_(min(1.0, epochs / self.warmup_epochs))
        try:
            if self._adversary is not None:
                self._critic_steps(self._adversary, x)
            terms, gradients = (self._graph_for(x) or self._gradients)(x)
        except ValueError as error:
            self._explain(error, self.trainer.fit_loop.total_batch_idx == 0, x)
        if x.device.type == "cpu" or index % 50 == 0:  # on a GPU, looking at the loss waits for it
            self._check(terms)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # a graph replayed does not, and Lightning's validation lets go of them
        optimizer = self._optimizers()[0]
        if self.gradient_clip is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        optimizer.step()
        self._means.add(terms, len(x))
        self._last = terms

    def _graph_for(self, x: Tensor) -> CudaGraph | None:
        return self._graph if x.is_cuda else None

    def _gradients(self, x: Tensor) -> tuple[Terms, list[Tensor | None]]:
        """The terms of a batch, and the gradient to each of the model's parameters."""
        terms = self._loss_in_warmup(x) if self._strength is not None else self.model.loss(x)
        self.zero_grad()
        self._backward(terms.loss)
        return replace(terms, loss=terms.loss.detach()), [p.grad for p in self.model.parameters()]

    def _loss_in_warmup(self, x: Tensor) -> Terms:
        self.model.objective.strength = self._strength
        try:
            return self.model.loss(x)
        finally:
            self.model.objective.strength = None

    def on_train_epoch_end(self) -> None:
        self._check(self._last)  # before the checkpoint of this epoch is written
        if bad := [name for name, t in self.named_parameters() if not t.isfinite().all()]:
            raise TrainingDiverged(self._diverged(f"{bad[0]} holds NaN or infinity"))
        self.log_dict(self._means.by_name("train"), prog_bar=True)

    def on_validation_epoch_start(self) -> None:
        self._val_means = _Means()

    def on_validation_epoch_end(self) -> None:
        means = self._val_means.by_name("val")
        self.log_dict(means)
        self._validated = True
        if not math.isfinite(means["val_loss"]):  # training sees what the last step of an epoch did in the next one
            raise TrainingDiverged(
                self._diverged(", ".join(f"{name} {value.item():g}" for name, value in means.items()))
            )

    def validation_step(self, batch: Any, index: int) -> None:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_stream(self.seed, -1 - index))
            x = self._images(batch)
            try:
                terms = self.model.loss(x)
            except ValueError as error:
                self._explain(error, not self._validated, x)
        self._val_means.add(terms, len(x))

    def _images(self, batch: Any) -> Tensor:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        return binarize(x) if self.dynamic_binarization else x

    def _critic_steps(self, adversary: AdversarialLoss, x: Tensor) -> None:
        optimizer = self._optimizers()[1]
        for _ in range(adversary.critic_steps):
            with torch.no_grad():
                z = self.model.encode(x).rsample()
            loss = adversary.critic_loss(z, self.model.prior.sample(len(z)))
            optimizer.zero_grad()
            self._backward(loss)
            optimizer.step()

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):  # each gradient in the precision of its forward pass
            self.manual_backward(loss)

    def _optimizers(self) -> Sequence[Any]:
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _check(self, terms: Terms) -> None:
        if not math.isfinite(terms.loss.item()):
            values = ", ".join(f"{name} {value.item():g}" for name, value in terms.as_dict().items())
            raise TrainingDiverged(self._diverged(values))

    def _explain(self, error: ValueError, first: bool, x: Tensor) -> NoReturn:
        """Of a first batch whose codes are numbers: settings that do not fit; else a divergence has met NaN."""
        if first and all(t.isfinite().all() for t in self.model.encode(x)):
            raise error
        raise TrainingDiverged(self._diverged(str(error))) from error

    def _diverged(self, what: str) -> str:
        checkpoints = [c.last for c in self.trainer.callbacks if isinstance(c, EpochCheckpoint)]  # type: ignore[attr-defined]
        last = next((str(path) for path in checkpoints if path.exists()), "none was written yet")
        return (
            f"training diverged at step {self.trainer.fit_loop.total_batch_idx} (epoch {self.current_epoch}): {what}. "
            f"Last good checkpoint: {last}. Try a smaller lr, gradient_clip, or a likelihood with a larger floor."
        )


class _Means:
    """Means of the terms over the examples of an epoch (logging every step would cost more than a small model does)."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.examples = 0

    def add(self, terms: Terms, examples: int) -> None:
        self.examples += examples
        for name, value in terms.as_dict().items():
            self.sums[name] = self.sums.get(name, 0) + examples * value

    def by_name(self, stage: str) -> dict[str, Tensor]:
        return {f"{stage}_{name}": total / self.examples for name, total in self.sums.items()}


class EpochCheckpoint(Checkpoint):
    """Saves the whole state to folder/last.ckpt after every `every` epochs and the last, whole or not at all.

    Args:
        old: files of a training that is done, the first of which says so; they go when an epoch starts.
    """

    def __init__(self, folder: Path, every: int = 1, old: Sequence[Path] = ()) -> None:
        self.last, self.every, self.old = folder / "last.ckpt", every, old

    def epochs_done(self) -> int:
        """How many epochs the last checkpoint has behind it; 0 where there is none.

        Raises:
            ValueError: it cannot be read.
        """
        if not self.last.exists():
            return 0
        try:
            with zipfile.ZipFile(self.last) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"wrong checksum of {damaged}")
            return int(torch.load(self.last, map_location="cpu", weights_only=True, mmap=True)["epoch"]) + 1
        except Exception as error:  # of a file cut short or overwritten, whatever torch meets in it
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{self.last} is damaged ({reason}): delete it to start the run again from its beginning"
            ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for unfinished in self.last.parent.glob(".last.*"):  # of a run that was killed
            unfinished.unlink(missing_ok=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for file in self.old:
            file.unlink(missing_ok=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = trainer.current_epoch + 1
        if done % self.every and done != trainer.max_epochs:
            return
        try:
            with whole(self.last) as temporary:
                trainer.save_checkpoint(temporary)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}"
                + (f" ({error.filename})" if error.filename else "")
                + (": the last checkpoint stays as it was" if self.last.exists() else ": there is no checkpoint yet"),
                str(self.last),
            ) from error


class _Checkpoints(TorchCheckpointIO):
    """Writes to the path itself: Lightning's would first write to the folder of temporary files of the system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()  # of a file, torch.save would hide that the disk is full
        torch.save(checkpoint, content)
        with open(path, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())


class ImageDataModule(pl.LightningDataModule):
    """Batches of an `ImageData` as float32 [n, C, H, W] in [0, 1].

    Training batches are reshuffled every epoch and all have `batch_size` images (the remainder waits for another
    epoch) unless the set is smaller than that; test batches are as equal in size as can be, up to `TEST_BATCH`.
    """

    TEST_BATCH = 512

    def __init__(self, data: ImageData, batch_size: int = 100, *, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size: got {batch_size}; accepted: 2 or more")
        self.data, self.batch_size, self.seed = data, batch_size, seed

    def train_dataloader(self) -> DataLoader:
        images = self.data.train_images
        return self._loader(images, ShuffledBatches(len(images), self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader:
        images = self.data.test_images
        order = torch.arange(len(images))
        return self._loader(images, list(order.tensor_split(math.ceil(len(order) / self.TEST_BATCH))))

    def _loader(self, images: Tensor, batches: Any) -> DataLoader:
        generator = torch.Generator()  # a loader without one takes numbers from the stream that training's noise uses
        return DataLoader(_Batches(images, self.data.levels), sampler=batches, batch_size=None, generator=generator)


class ShuffledBatches(Sampler[Tensor]):
    """Index tensors of full batches, in an order that depends on the seed and the epoch alone."""

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed, self.epoch = n, min(batch_size, n), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(_stream(self.seed, self.epoch))
        order = torch.randperm(self.n, generator=generator)
        yield from order[: len(self) * self.batch_size].split(self.batch_size)


class _Batches(Dataset[Tensor]):
    def __init__(self, images: Tensor, levels: int) -> None:
        self.images, self.levels = images, levels

    def __getitem__(self, index: Tensor) -> Tensor:
        return to_unit(self.images[index], self.levels)


def train(
    data: str = "digits",
    preset: str = "mmd_vae",
    *,
    alpha: float | None = None,
    lambda_: float | None = None,
    objective: dict[str, Any] | None = None,
    latent_dim: int = 10,
    encoder: str | dict[str, Any] = "mlp",
    decoder: str | dict[str, Any] = "mlp",
    likelihood: str | dict[str, Any] = "bernoulli",
    prior: str | dict[str, Any] = "normal",
    root: str | None = None,
    train_size: int | None = None,
    binarize: Binarize = None,
    epochs: int | None = None,
    evaluate_every: int = 1,
    batch_size: int = 100,
    lr: float = 1e-3,
    warmup_epochs: float | None = None,
    gradient_clip: float | None = None,
    precision: Precision = "32-true",
    cuda_graph: bool = True,
    seed: int = 0,
    out: str | None = None,
    resume: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Train an InfoVAE and write a run folder.

    Args:
        data: "digits", "mnist", "cifar10", or the path of a folder of images, an .npy or an .npz file.
        preset: "elbo", "beta_vae", "mmd_vae", "stein_vae", "aae", "wae" or "unregularized".
        alpha: overrides the preset's, where it has one; the KL term weighs 1 - alpha.
        lambda_: overrides the preset's, where it has one; the divergence weighs alpha + lambda - 1.
        objective: more arguments of the preset, e.g. {"kernel": {"name": "imq", "bandwidth": 1.0}}.
        latent_dim: dimension of z.
        encoder: "mlp" or "dcgan", or {"name": "mlp", "hidden": [256, 256]} and the like; with a PixelCNN, which could
            do without z, "batch_norm" is true unless it is given.
        decoder: likewise, or "pixelcnn", e.g. {"name": "pixelcnn", "layers": 12, "maps": 32}, or "pixelcnn_pp".
        likelihood: "bernoulli", "gaussian", "categorical", "discretized_logistic_mixture", with options likewise. The
            levels of the latter two are those of the data.
        prior: "normal", "uniform", {"name": "gaussian_mixture", "means": [[...]]}.
        root: folder of the data set's files, where it is not built in.
        train_size: keep that many training images, balanced over the classes.
        binarize: "threshold", "static" (one seeded draw), "dynamic" (a new draw for every batch), or null: grey values,
            but "dynamic" for a PixelCNN with a Bernoulli likelihood, whose pixels must be the bits that it draws.
        epochs: passes over the training set; default 100, or what the resumed run has.
        evaluate_every: epochs between two validations and checkpoints.
        batch_size: images a step.
        lr: learning rate of Adam.
        warmup_epochs: let the weights of the KL term and of the divergence grow from 0 over so many epochs, or null.
        gradient_clip: largest norm of the gradient, or null.
        precision: "32-true", or "bf16-mixed": bfloat16 in convolutions and products of matrices, for GPUs; weights, z
            and the loss stay float32.
        cuda_graph: on a GPU, send loss and gradients of a step as one CUDA graph; not with an adversarial divergence,
            nor with `checkpoint_layers`.
        seed: of the weights, the order of the examples and the noise.
        out: folder of the run; default runs/DATA-PRESET-SEED.
        resume: folder of a run to continue with its own settings; only epochs and progress may be given with it.
        progress: show a progress bar; default: if standard error is a terminal.

    Returns:
        the folder of the run.

    Raises:
        ValueError, FileNotFoundError: bad settings or data; the folder already holds a run.
        TrainingDiverged: the loss became NaN or infinite.
    """
    config = {key: value for key, value in locals().items() if key not in ("resume", "progress")}
    for key in ("data", "root"):  # a run may be evaluated from another folder; what is not there, `load_data` tells
        path = config[key]
        if isinstance(path, str) and path not in NAMED and Path(path).expanduser().exists():
            config[key] = os.path.abspath(Path(path).expanduser())  # a link keeps its own name
    if resume is None:
        config["epochs"] = 100 if epochs is None else epochs
        folder = Path(out or f"runs/{Path(data).stem}-{preset}-{seed}")
        config["out"] = str(folder)
        given = {"name", *(key for key in ("alpha", "lambda_") if config[key] is not None)}
        if twice := sorted(given & set(objective or {})):
            raise ValueError(f"objective: got {', '.join(twice)}, which other options give; accepted: once")
        if any((folder / part).exists() for part in ("config.json", "checkpoints/last.ckpt", "model/config.json")):
            raise ValueError(
                f"{folder} already holds a run: continue it with --resume {folder}, or choose another folder with --out"
            )
    else:
        folder = Path(resume)
        config = _resumed_config(folder, config)
    _check_settings(config)
    images = load_data(
        config["data"],
        root=config["root"],
        train_size=config["train_size"],
        binarize=None if config["binarize"] == "dynamic" else config["binarize"],
        seed=config["seed"],
    )
    if resume is None:
        config |= _fitted(config, images)
    torch.manual_seed(_stream(config["seed"], -(2**20)))
    model = InfoVAE.from_config(images.shape, **model_config(config))
    if model.objective.divergence_weight != 0 and len(images.test_images) < 2:
        raise ValueError(
            f"{images.name}: got a test set of one image; accepted: two or more, whose codes have a divergence"
        )
    module = InfoVAETraining(
        model,
        lr=config["lr"],
        gradient_clip=config["gradient_clip"],
        seed=config["seed"],
        dynamic_binarization=config["binarize"] == "dynamic",
        warmup_epochs=config["warmup_epochs"],
        cuda_graph=config["cuda_graph"],
    )
    batches = ImageDataModule(images, config["batch_size"], seed=config["seed"])
    old = [folder / name for name in ("model/config.json", "metrics.json", "samples.png")]
    checkpoint = EpochCheckpoint(folder / "checkpoints", config["evaluate_every"], old)
    done = checkpoint.epochs_done()
    if config["epochs"] < done:
        raise ValueError(f"epochs: got {config['epochs']}; accepted: {done} or more, as {folder} has done so many")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    verb = "train" if resume is None else "resume"
    print(f"{verb} {folder}: {config['preset']} on {images.name}, seed {config['seed']}, {config['epochs']} epochs")
    progress = sys.stderr.isatty() if progress is None else progress
    trainer = _trainer(folder, config["epochs"], checkpoint, progress, config["precision"])
    try:
        trainer.fit(module, batches, ckpt_path=checkpoint.last if done else None)
    except SystemExit:  # how Lightning ends after Ctrl-C and SIGTERM
        raise KeyboardInterrupt(f"interrupted; continue with --resume {folder}") from None
    except TrainingDiverged:  # its settings and curves tell why
        raise
    except Exception:
        if resume is None and not checkpoint.last.exists():  # nothing to continue, nor to count as the next run's
            (folder / "config.json").unlink(missing_ok=True)
            shutil.rmtree(trainer.log_dir or "", ignore_errors=True)
        raise
    if trainer.state.status != "finished":
        raise KeyboardInterrupt(f"interrupted; continue with --resume {folder}")
    model.save_pretrained(folder / "model")
    return folder


def _check_settings(config: dict[str, Any]) -> None:
    """ValueError for a setting of another kind than `train` takes: a config.json may hold anything."""
    kinds: dict[str, tuple[Any, float | None, str]] = {  # of numbers also above what
        "encoder decoder likelihood prior": (str | dict, None, "a name, or a dict of its name and options"),
        "objective": (dict | None, None, "a dict of arguments of the preset"),
        "data preset": (str, None, "a string"),
        "root out": (str | None, None, "a string"),
        "cuda_graph": (bool, None, "true or false"),
        "latent_dim epochs evaluate_every": (Integral, 0, "an integer, 1 or more"),
        "batch_size": (Integral, 1, "an integer, 2 or more"),
        "train_size": (Integral | None, 0, "an integer, 1 or more"),
        "seed": (Integral, -1, "an integer, 0 or more"),
        "lr": (Real, 0, "a positive number"),
        "gradient_clip warmup_epochs": (Real | None, 0, "a positive number"),
        "alpha lambda_": (Real | None, -math.inf, "a finite number"),
    }
    for names, (kind, above, accepted) in kinds.items():
        for name in names.split():
            value = config[name]
            fits = isinstance(value, kind)
            if fits and above is not None and value is not None:
                fits = not isinstance(value, bool) and above < value < math.inf
            if not fits:
                raise ValueError(f"{name}: got {value!r}; accepted: {accepted}")
    one_of("precision", config["precision"], get_args(Precision))
    one_of("binarize", config["binarize"], (None, "threshold", "static", "dynamic"))


def model_config(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `InfoVAE.from_config`, but the shape, for the arguments of `train`."""
    objective = {"name": config["preset"], **(config["objective"] or {})}
    objective |= {key: config[key] for key in ("alpha", "lambda_") if config[key] is not None}
    names = ("latent_dim", "encoder", "decoder", "likelihood", "prior")
    return {name: config[name] for name in names} | {"objective": objective}


def _fitted(config: dict[str, Any], images: ImageData) -> dict[str, Any]:
    """The settings that depend on others and on the data."""
    encoder, decoder, likelihood = (
        {"name": c} if isinstance(c, str) else c for c in (config[key] for key in ("encoder", "decoder", "likelihood"))
    )
    fitted: dict[str, Any] = {}
    if decoder.get("name") in ("pixelcnn", "pixelcnn_pp"):
        if "batch_norm" not in encoder:
            print('encoder: with batch normalisation, lest this decoder ignore z; without: {"batch_norm": false, ...}')
            fitted["encoder"] = encoder | {"batch_norm": True}
        if likelihood.get("name") == "bernoulli" and images.levels > 2 and config["binarize"] != "dynamic":
            print("binarize: dynamic, as this decoder draws bits; for grey values choose likelihood categorical")
            fitted["binarize"] = "dynamic"
    if likelihood.get("name") in ("categorical", "discretized_logistic_mixture"):
        levels = images.levels if config["binarize"] is None else 2
        if likelihood.get("levels") != levels:
            print(f"likelihood: of {levels} levels, as the images have")
            fitted["likelihood"] = likelihood | {"levels": levels}
    return fitted


def run_data(config: dict[str, Any]) -> ImageData:
    """The images of a run, for evaluation: dynamic binarisation becomes one seeded draw."""
    return load_data(
        config["data"],
        root=config["root"],
        train_size=config["train_size"],
        binarize="static" if config["binarize"] == "dynamic" else config["binarize"],
        seed=config["seed"],
    )


def read_run(folder: str | Path) -> dict[str, Any]:
    """The settings of the run in a folder.

    Raises:
        FileNotFoundError: there is no run. ValueError: its config.json is damaged, or not one of this version.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the folder of a run, as `infovae-fast train` writes it")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or "preset" not in config:
        raise ValueError(f"{path} is not the config.json of a run: it has no key 'preset'")
    # Runs of an earlier version do not name these.
    new = ("precision", "cuda_graph", "warmup_epochs")
    config = {name: signature(train).parameters[name].default for name in new} | config
    if lacking := [name for name in signature(train).parameters if name not in {"resume", "progress", *config}]:
        raise ValueError(f"{path} is not complete: it has no key {', '.join(map(repr, lacking))}")
    try:
        _check_settings(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config["preset"] not in PRESETS:
        raise ValueError(f"{path}: got preset {config['preset']!r}; accepted: {', '.join(map(repr, PRESETS))}")
    return config


def without_inf(content: Any) -> Any:
    """What JSON has no number for, inf and NaN, is None."""
    if isinstance(content, dict):
        return {key: without_inf(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_inf(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: Any) -> None:
    """Writes the file whole or not at all; numbers and arrays of NumPy as Python's."""
    write_bytes(path, (json.dumps(content, indent=1, default=lambda value: value.tolist()) + "\n").encode())


def _resumed_config(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    defaults = {name: parameter.default for name, parameter in signature(train).parameters.items()}
    config = read_run(folder)
    changed = [key for key, value in given.items() if value not in (defaults[key], config[key]) and key != "epochs"]
    if changed:
        raise ValueError(
            f"--resume {folder} takes its settings from that run; only --epochs and --progress may be given with it, "
            f"got {', '.join(changed)}"
        )
    if given["epochs"] is not None:
        config["epochs"] = given["epochs"]
    return config | {"out": str(folder)}


def _trainer(
    folder: Path, epochs: int, checkpoint: EpochCheckpoint, progress: bool, precision: Precision
) -> pl.Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for harmless in (".*does not have many workers.*", ".*LeafSpec.* is deprecated.*"):
        warnings.filterwarnings("ignore", harmless)
    csv = CSVLogger(folder, name="logs", flush_logs_every_n_steps=1)
    tensorboard = TensorBoardLogger(folder, name="logs", version=csv.version)
    return pl.Trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=checkpoint.every,
        accelerator="auto",
        devices=1,
        precision=precision,
        logger=[csv, tensorboard],
        plugins=[_Checkpoints()],
        callbacks=[checkpoint, *([TQDMProgressBar()] if progress else [])],
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


def _stream(seed: int, index: int) -> int:
    """A seed of its own for every (seed, index)."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) % 2**63
