"""The command as a user gives it: results, exit codes, and errors in one line."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest
import timm
import torch

from g2sd.cli import main
from g2sd.official import load_official
from g2sd.recipes import RECIPES
from visionkernels.weights import read_checkpoint


def g2sd(*argv):
    return main([str(argument) for argument in argv])


def fails(capsys, *argv):
    """Run a command whose input is wrong and return its one line on stderr."""
    code = g2sd(*argv)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("g2sd: error: ")
    assert err.count("\n") == 1
    return err


COMMANDS = [
    "train", "distill", "pretrain", "finetune", "probe", "eval", "inspect", "convert", "export", "info", "reproduce",
    "bench",
]  # fmt: skip


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_fits_a_screen(self, capsys, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "80")
        assert g2sd(command, "--help") == 0
        assert len(capsys.readouterr().out.splitlines()) <= 40

    def test_lists_commands(self, capsys):
        assert g2sd("--help") == 0
        out = capsys.readouterr().out
        assert all(f"  {command} " in out for command in COMMANDS)

    def test_version(self, capsys):
        assert g2sd("--version") == 0
        assert capsys.readouterr().out == f"g2sd {version('g2sd-vision')}\n"

    def test_unknown_command(self, capsys):
        assert "distil" in fails(capsys, "distil")

    @pytest.mark.slow
    def test_as_a_module(self):
        ran = subprocess.run([sys.executable, "-m", "g2sd", "--help"], capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert "  distill " in ran.stdout

    @pytest.mark.slow
    def test_imports_little(self):
        """Neither the package nor its help needs what only training, plots and export use."""
        script = (
            "import sys, g2sd, g2sd.cli; g2sd.cli.main(['--help']); "
            "print([m for m in ('accelerate', 'torchmetrics', 'onnx', 'matplotlib') if m in sys.modules])"
        )
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert ran.stdout.splitlines()[-1] == "[]", ran.stderr


class TestTrain:
    """Any recipe, with what it needs and nothing else."""

    @pytest.mark.parametrize(
        ("stage", "files"),
        [
            ("pretrain", {}),
            ("generic", {"--teacher": "pretrain"}),
            ("finetune", {"--init": "pretrain"}),
            ("specific", {"--init": "generic", "--teacher": "finetune"}),
        ],
    )
    def test_is_the_stage(self, runs, pictures, micro, save_recipe, tmp_path, stage, files):
        flags = [part for flag, source in files.items() for part in (flag, runs[source])]
        command = ["train", save_recipe(micro[stage]), *flags, "--data", pictures, "--out", tmp_path / "run"]
        assert g2sd(*command) == 0
        torch.testing.assert_close(
            read_checkpoint(tmp_path / "run/weights.safetensors").state, read_checkpoint(runs[stage]).state
        )

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (
                ["pretrain_tiny_in1k", "--teacher", "a.pth"],
                "recipe pretrain_tiny_in1k does not take --teacher",
            ),
            (["generic_tiny_in1k"], "recipe generic_tiny_in1k needs --teacher"),
            (["generic_tiny_in1k", "--init", "a"], "recipe generic_tiny_in1k does not take --init"),
            (["linear_mnist5k"], "recipe linear_mnist5k needs --init"),
            (["specific_tiny_coco"], "has mode='imitation' and needs --teacher"),
            (
                ["finetune_tiny_ade20k", "--teacher", "a.pth"],
                "does not take --teacher; choose one of specific distillation",
            ),
            (["finetune_tiny"], "did you mean"),
        ],
    )
    def test_errors(self, capsys, tmp_path, argv, message):
        assert message in fails(capsys, "train", *argv, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestPretrain:
    def test_judges_the_loss(self, capsys, pictures, micro, save_recipe, tmp_path):
        assert g2sd("pretrain", save_recipe(micro["pretrain"]), "--data", pictures, "--out", tmp_path / "run") == 0
        out = capsys.readouterr().out
        assert "(flat patches)" in out and "loss in evaluation" in out
        assert f"weights: {tmp_path}/run/weights.safetensors" in out

    def test_flags(self, pictures, micro, save_recipe, tmp_path):
        flags = ["--batch-size", 8, "--epochs", 1, "--accumulation-steps", 2, "--precision", "bf16", "--seed", 3]
        recipe = save_recipe(micro["pretrain"])
        assert g2sd("pretrain", recipe, "--data", pictures, "--out", tmp_path / "run", *flags) == 0
        found = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
        assert (found["batch_size"], found["accumulation_steps"], found["precision"]) == (8, 2, "bf16")
        assert found["seed"] == 3
        assert found["optimizer"]["lr"] == micro["pretrain"].fit.optimizer.lr / 2

    def test_recipe_for_another_stage(self, capsys, tmp_path):
        said = fails(capsys, "pretrain", "generic_tiny_in1k", "--out", tmp_path)
        assert "recipe generic_tiny_in1k is for another stage; recipes of this stage: pretrain_tiny_in1k" in said


class TestDistillGeneric:
    def test_judges_the_loss(self, capsys, runs, pictures, micro, save_recipe, tmp_path):
        """Beside it stand the losses of guesses that need no student."""
        command = ["distill", "generic", save_recipe(micro["generic"]), "--teacher", runs["pretrain"]]
        assert g2sd(*command, "--data", pictures, "--out", tmp_path / "run") == 0
        out = capsys.readouterr().out
        assert "(always 0) and " in out and "(the mean of each position): " in out
        assert "below, as it must be" in out or "NOT below" in out
        torch.testing.assert_close(
            read_checkpoint(tmp_path / "run/weights.safetensors").state, read_checkpoint(runs["generic"]).state
        )

    def test_rerun_resumes(self, capsys, runs, pictures, micro, save_recipe, tmp_path):
        command = ["distill", "generic", save_recipe(micro["generic"]), "--teacher", runs["pretrain"]]
        for _ in range(2):
            assert g2sd(*command, "--data", pictures, "--out", tmp_path / "run") == 0
        assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 2

    def test_given_back(self, runs, pictures, tmp_path):
        """The run.json of a run is a recipe."""
        run = runs["generic"].parent / "run.json"
        command = ["distill", "generic", run, "--teacher", runs["pretrain"], "--data", pictures]
        assert g2sd(*command, "--out", tmp_path / "run", "--epochs", 1) == 0

    def test_encoder_alone(self, capsys, runs, pictures, micro, save_recipe, tmp_path):
        state = read_checkpoint(runs["pretrain"]).state
        state = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask"))}
        torch.save(state, tmp_path / "base.pth")
        command = ["distill", "generic", save_recipe(micro["generic"]), "--data", pictures]
        command += ["--teacher", tmp_path / "base.pth"]
        assert "mae_pretrain_vit_base_full.pth" in fails(capsys, *command, "--out", tmp_path / "run")

    @pytest.mark.parametrize("option", [["--init", "x.pth"], ["--loss", "nkd"]])
    def test_options_of_the_other_stage(self, capsys, tmp_path, option):
        command = ["distill", "generic", "generic_mnist5k", "--teacher", "x.pth", "--out", tmp_path]
        said = fails(capsys, *command, *option)
        assert f"{option[0][2:]}={option[1]} is for `g2sd distill specific`" in said

    def test_errors(self, capsys, runs, pictures, micro, save_recipe, tmp_path):
        command = ["distill", "generic", save_recipe(micro["generic"]), "--data", pictures, "--out", tmp_path / "run"]
        assert "none.pth is not a file" in fails(capsys, *command, "--teacher", "none.pth")
        assert "--teacher" in fails(capsys, *command)
        assert "holds 'average'" in fails(capsys, *command, "--teacher", runs["finetune"])
        assert not (tmp_path / "run").exists()
        other = ["distill", "generic", "finetune_tiny_in1k", "--teacher", "x.pth", "--out", tmp_path]
        assert "recipe finetune_tiny_in1k is for another stage" in fails(capsys, *other)


class TestDistillSpecific:
    def test_classifies(self, capsys, runs, pictures, micro, save_recipe, tmp_path):
        files = ["--init", runs["generic"], "--teacher", runs["finetune"], "--data", pictures]
        recipe = save_recipe(micro["specific"])
        assert g2sd("distill", "specific", recipe, *files, "--out", tmp_path / "run", "--epochs", 1) == 0
        out = capsys.readouterr().out
        assert "top-1 " in out
        assert "always the most frequent class: top-1 33.33 %" in out
        assert load_official(tmp_path / "run/weights.safetensors").num_classes == 3

    @pytest.mark.parametrize("loss", ["soft", "nkd"])
    def test_loss(self, runs, pictures, micro, save_recipe, tmp_path, loss):
        files = ["--teacher", runs["finetune"], "--data", pictures, "--loss", loss, "--epochs", 1]
        assert g2sd("distill", "specific", save_recipe(micro["specific"]), *files, "--out", tmp_path / "run") == 0
        trained = json.loads((tmp_path / "run/run.json").read_text())["trained"]
        assert trained["settings"]["mode"] == loss

    def test_errors(self, capsys, runs, pictures, micro, save_recipe, tmp_path):
        common = ["--teacher", runs["finetune"], "--data", pictures, "--out", tmp_path / "run"]
        said = fails(capsys, "distill", "specific", save_recipe(micro["finetune"]), *common)
        assert "does not take --teacher; choose one of specific distillation" in said
        recipe = save_recipe(micro["specific"])
        assert "none.pth is not a file" in fails(capsys, "distill", "specific", recipe, *common, "--init", "none.pth")
        wrong = ["distill", "specific", recipe, *common, "--init", runs["pretrain"]]
        assert "cls_token [1, 1, 32] instead of [1, 1, 24]" in fails(capsys, *wrong)
        assert "warm" in fails(capsys, "distill", "specific", recipe, *common, "--loss", "warm")

    def test_another_run(self, capsys, runs, pictures, micro, save_recipe):
        recipe = save_recipe(micro["specific"])
        files = ["--init", runs["generic"], "--teacher", runs["finetune"], "--data", pictures]
        said = fails(capsys, "distill", "specific", recipe, *files, "--out", runs["specific"].parent, "--seed", 5)
        assert "holds another run: seed was 0, now 5" in said


class TestFinetune:
    @pytest.mark.parametrize("start", [True, False])
    def test_classifies(self, capsys, runs, pictures, micro, save_recipe, tmp_path, start):
        options = ["--init", runs["pretrain"]] if start else []
        recipe = save_recipe(micro["finetune"])
        command = ["finetune", recipe, "--data", pictures, "--out", tmp_path / "run", "--epochs", 1, *options]
        assert g2sd(*command) == 0
        assert "top-1 " in capsys.readouterr().out
        trained = json.loads((tmp_path / "run/run.json").read_text())["trained"]
        assert ("started_from" in trained["details"]) == start

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["specific_tiny_in1k"], "needs a teacher; run `g2sd distill specific specific_tiny_in1k --teacher FILE`"),
            (["finetune_tinny_in1k"], "unknown recipe 'finetune_tinny_in1k'; did you mean 'finetune_tiny_in1k'?"),
            (["generic_tiny_in1k"], "is for another stage; recipes of this stage: finetune_tiny_in1k"),
            (["finetune_tiny_in1k"], "has no built-in data; give --data FOLDER"),
            (["finetune_tiny_in1k", "--data", "/nowhere"], "--data /nowhere does not exist"),
            (["nowhere/run.json"], "nowhere/run.json: No such file or directory"),
            (["finetune_tiny_in1k", "--batch-size", "0"], "batch_size=0 must be at least 1"),
            (["finetune_tiny_in1k", "--epochs", "many"], "--epochs"),
            (["finetune_tiny_in1k", "--precision", "fp8"], "fp8"),
            (["finetune_mnist5k", "--init", "nowhere.pth"], "nowhere.pth is not a file"),
        ],
    )
    def test_errors(self, capsys, tmp_path, argv, message):
        assert message in fails(capsys, "finetune", *argv, "--out", tmp_path)

    def test_without_the_extra(self, capsys, monkeypatch, pictures, micro, save_recipe, tmp_path):
        monkeypatch.setitem(sys.modules, "torchmetrics", None)
        said = fails(capsys, "finetune", save_recipe(micro["finetune"]), "--data", pictures, "--out", tmp_path / "run")
        assert "torchmetrics is not installed; run: pip install 'g2sd-vision[train]'" in said


class TestProbe:
    def test_neighbours(self, capsys, runs, pictures, tmp_path):
        """On pictures as the file's run had them."""
        command = ["probe", "knn", runs["generic"], "--data", pictures, "--neighbours", 3]
        assert g2sd(*command) == 0
        said = capsys.readouterr().out
        assert re.fullmatch(r"top-1 [\d.]+ %, majority class 33.33 %, 12 images\n", said)
        assert g2sd(*command, "--batch-size", 5, "--device", "cpu") == 0
        assert capsys.readouterr().out == said
        assert "patch_size=8" in fails(capsys, *command, "--recipe", "linear_mnist5k")  # pictures of 28 pixels

    def test_linear(self, capsys, runs, pictures, tmp_path):
        options = ["--epochs", 2, "--batch-size", 8, "--device", "cpu", "--workers", 0, "--out", tmp_path / "run"]
        assert g2sd("probe", "linear", runs["generic"], "--data", pictures, *options) == 0
        assert "top-1" in capsys.readouterr().out
        run = json.loads((tmp_path / "run/run.json").read_text())
        assert run["trained"]["details"]["started_from"] == str(runs["generic"])
        recipe = run["recipe"]
        assert (recipe["epochs"], recipe["batch_size"]) == (2, 8)
        assert recipe["optimizer"]["lr"] == pytest.approx(1.6 * 8 / 4096)

    def test_errors(self, capsys, runs, tmp_path):
        assert "out is missing; give --out FOLDER" in fails(capsys, "probe", "linear", runs["generic"])
        assert "none.pth is not a file" in fails(capsys, "probe", "linear", "none.pth", "--out", tmp_path)
        said = fails(capsys, "probe", "knn", runs["generic"], "--recipe", "generic_mnist5k")
        assert "is for another stage" in said


class TestEval:
    def test_agrees_with_training(self, capsys, runs, pictures, tmp_path):
        command = ["eval", "--checkpoint", runs["specific"], "--data", pictures, "--json", tmp_path / "eval.json"]
        assert g2sd(*command) == 0
        out = capsys.readouterr().out
        assert "12 images\n" in out and "always the most frequent class: top-1 33.33 %" in out
        found = json.loads((tmp_path / "eval.json").read_text())
        logged = json.loads((runs["specific"].parent / "log.jsonl").read_text().splitlines()[-1])
        assert (found["top1"], found["loss"]) == (logged["top1"], pytest.approx(logged["val_loss"], rel=1e-5))

    def test_errors(self, capsys, runs, pictures, tmp_path):
        data = ["--data", pictures]
        assert "nowhere.pth is not a file" in fails(capsys, "eval", "--checkpoint", "nowhere.pth", *data)
        assert "holds an autoencoder, which has no metric on labelled data" in fails(
            capsys, "eval", "--checkpoint", runs["generic"], *data
        )
        said = fails(capsys, "eval", "--checkpoint", runs["specific"], *data, "--device", "toaster")
        assert "device='toaster' cannot be used" in said
        (tmp_path / "eval.json").touch()
        kept = ["eval", "--checkpoint", runs["specific"], *data, "--json", tmp_path / "eval.json"]
        assert "eval.json exists; pass --overwrite" in fails(capsys, *kept)
        assert (tmp_path / "eval.json").read_text() == ""


class TestInspect:
    def test_tells(self, capsys, runs, tmp_path):
        assert g2sd("inspect", runs["generic"], "--json", tmp_path / "found.json") == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{runs['generic']}: student of generic distillation")
        assert "  use: start of `g2sd distill specific`" in out
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["contents"]["kind"] == "generic" and found["contents"]["width"] == 24

    def test_errors(self, capsys, runs, tmp_path):
        assert "none.pth is not a file" in fails(capsys, "inspect", "none.pth")
        (tmp_path / "text.pth").write_text("hello")
        assert "text.pth" in fails(capsys, "inspect", tmp_path / "text.pth")
        assert "has no entry 'ema'" in fails(capsys, "inspect", runs["generic"], "--entry", "ema")
        (tmp_path / "found.json").touch()
        assert "--overwrite" in fails(capsys, "inspect", runs["generic"], "--json", tmp_path / "found.json")


class TestConvert:
    def test_to_timm(self, capsys, runs, tmp_path):
        out = tmp_path / "timm.safetensors"
        assert g2sd("convert", runs["generic"], "--to", "timm", "--out", out) == 0
        assert capsys.readouterr().out
        ours, theirs = read_checkpoint(runs["generic"]).state, read_checkpoint(out).state
        torch.testing.assert_close(theirs["blocks.0.attn.qkv.weight"], ours["blocks.0.attn.qkv.weight"])

    def test_errors(self, capsys, runs, tmp_path):
        out = tmp_path / "x.safetensors"
        assert "none.pth is not a file" in fails(capsys, "convert", "none.pth", "--to", "timm", "--out", out)
        assert "keras" in fails(capsys, "convert", runs["generic"], "--to", "keras", "--out", out)
        out.touch()
        assert "--overwrite" in fails(capsys, "convert", runs["generic"], "--to", "timm", "--out", out)


class TestExport:
    def test_program(self, capsys, runs, tmp_path):
        assert g2sd("export", "--checkpoint", runs["specific"], "--out", tmp_path / "m.pt2", "--head", "class") == 0
        assert "images [batch, 3, 32, 32] to logits [batch, 3]" in capsys.readouterr().out
        model, images = load_official(runs["specific"]), torch.randn(2, 3, 32, 32)
        model.eval_head = "class"
        extra = {"model.json": ""}
        program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
        described = json.loads(extra["model.json"])
        assert (described["num_classes"], described["label_names"]) == (3, ["blue", "green", "red"])
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)

    def test_errors(self, capsys, runs, tmp_path):
        assert "must be onnx or pt2" in fails(
            capsys, "export", "--checkpoint", runs["specific"], "--out", tmp_path / "m.bin"
        )
        said = fails(capsys, "export", "--checkpoint", runs["finetune"], "--out", tmp_path / "m.pt2", "--head", "class")
        assert "is for models with a distillation token" in said
        (tmp_path / "m.pt2").touch()
        assert "--overwrite" in fails(capsys, "export", "--checkpoint", runs["specific"], "--out", tmp_path / "m.pt2")


class TestInfo:
    def test_names(self, capsys):
        assert g2sd("info") == 0
        out = capsys.readouterr().out
        assert out.startswith(f"g2sd-vision {version('g2sd-vision')}\n")
        assert all(name in out for name in (*timm.list_models("mae_vit_*"), *timm.list_models("g2sd_vit_*"), *RECIPES))


class TestReproduce:
    def test_report(self, capsys, monkeypatch, tmp_path):
        """The cheap tables; what cannot be run says how."""
        from g2sd import tables

        chosen = [each for each in tables.tables() if each.name in ("imagenet", "classifiers")]
        cells = tuple(cell for cell in chosen[1].cells if cell.column == "params M")
        monkeypatch.setattr(tables, "tables", lambda: (chosen[0], replace(chosen[1], cells=cells)))
        assert g2sd("reproduce", "--json", tmp_path / "report.json") == 0
        out = capsys.readouterr().out
        assert "6 agrees" in out and "needs the data set" in out
        assert json.loads((tmp_path / "report.json").read_text())["package"] == "g2sd-vision"
        assert "report.json" in fails(capsys, "reproduce", "--json", tmp_path / "report.json")


class TestBench:
    def test_rows(self, capsys, monkeypatch, tmp_path):
        from g2sd import bench
        from visionkernels.profiling import BenchRow

        row = BenchRow(id="x", ratio=2.0, target=1.5, threads=1, dtype="float32", shape="1", note="")
        monkeypatch.setattr(bench, "measure", lambda *, full: iter([row] if not full else []))
        assert g2sd("bench", "--json", tmp_path / "bench.json") == 0
        (found,) = json.loads((tmp_path / "bench.json").read_text())
        assert (found["id"], found["ratio"], found["target"]) == ("x", 2.0, 1.5)
        assert "x: 2.00" in capsys.readouterr().err
        assert "bench.json" in fails(capsys, "bench", "--json", tmp_path / "bench.json")
