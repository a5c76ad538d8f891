//! The real program, on a tiny model: exit codes, messages, and the way from training to an answer.

mod acts_on;
mod data;
mod download;
mod elsewhere;
mod eval;
mod exports;
mod faults;
mod gemma4;
mod memory;
mod mistaken;
mod serve;
mod told_once;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program; runs that name no dtype compute in the tests'.
fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vora"));
    command.env("VORA_DTYPE", fixtures::dtype()).current_dir(workspace());
    command
}

fn vora(args: &[&str]) -> Output {
    program().args(args).env("HF_HUB_CACHE", "no-such-cache").output().expect("vora starts")
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Fails with what the program said.
#[track_caller]
fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{:?}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

/// The program fails with exit code `code` and says all of `parts`, in one line and without libtorch's frames.
#[track_caller]
fn fails(args: &[&str], code: i32, parts: &[&str]) {
    let output = vora(args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for part in parts {
        assert!(said.contains(part), "`{part}` is missing in: {said}");
    }
    assert!(!said.contains("frame #") && !said.contains("panicked"), "{said}");
}

#[test]
fn help_has_examples() {
    for command in [
        "train", "data", "merge", "quantize", "ask", "chat", "serve", "eval", "bench", "report", "inspect", "convert",
        "download",
    ] {
        let help = succeeded(&vora(&[command, "--help"]));
        assert!(help.contains("Examples:"), "{command}: {help}");
    }
}

#[test]
fn a_reader_that_has_enough_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = program().args(["inspect", "fixtures/tiny/llm", "--tensors"]).stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(141), "")); // 128 + SIGPIPE
}

/// libgomp reads how long it may wait, and glibc how it keeps memory, when they are loaded: it has to stand in the environment that
/// the program starts with.
#[cfg(target_os = "linux")]
#[test]
fn what_libraries_read_stands_in_the_environment_unless_the_user_said_otherwise() {
    const VARIABLES: [&str; 4] = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GLIBC_TUNABLES", "MALLOC_TOP_PAD_"];
    let folder = tempfile::tempdir().unwrap();
    let run = format!("output_dir={}", folder.path().display());
    let environment = |set: Option<(&str, &str)>| {
        let mut command = program();
        for name in VARIABLES {
            command.env_remove(name);
        }
        command.envs(set);
        command.args([
            "train",
            "--config",
            "crates/vora-train/recipes/smoke.yaml",
            "--set",
            &run,
            "--set",
            "max_steps=9999",
        ]);
        let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        // By its first step it is what it stays.
        let log = folder.path().join("metrics.jsonl");
        while !log.exists() && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let environment = std::fs::read(format!("/proc/{}/environ", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::remove_file(log).unwrap();
        let entries = environment.split(|&byte| byte == 0).map(text);
        VARIABLES.map(|name| {
            let start = format!("{name}=");
            entries.clone().find_map(|entry| entry.strip_prefix(&start).map(str::to_owned)).unwrap_or_default()
        })
    };
    let [spins, _, malloc, _] = environment(None);
    assert_eq!(spins, "10000");
    assert!(malloc.starts_with("glibc.malloc.hugetlb=1"), "{malloc}"); // glibc ends each of them in place as it reads them
    assert_eq!(environment(Some(("GOMP_SPINCOUNT", "7"))), ["7", "", &malloc, ""]);
    assert_eq!(environment(Some(("OMP_WAIT_POLICY", "passive"))), ["", "passive", &malloc, ""]);
    let own = "glibc.malloc.arena_max=3";
    assert_eq!(environment(Some(("GLIBC_TUNABLES", own))), ["10000", "", own, ""]);
    assert_eq!(environment(Some(("MALLOC_TOP_PAD_", "9"))), ["10000", "", "", "9"]);
}

#[test]
fn wrong_usage_exits_2() {
    fails(&["train"], 2, &["--config"]);
    fails(&["fly"], 2, &["unrecognized subcommand"]);
}

#[test]
fn errors_name_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    fails(&["train", "--config", &path("nope.yaml")], 1, &["error: ", "nope.yaml"]);
    let recipe = std::fs::read_to_string(workspace().join("crates/vora-train/recipes/smoke.yaml")).unwrap();
    std::fs::write(path("typo.yaml"), recipe.replace("patch_size:", "patch_sise:")).unwrap();
    fails(&["train", "--config", &path("typo.yaml")], 1, &["patch_sise"]);
    let smoke = "crates/vora-train/recipes/smoke.yaml";
    fails(&["train", "--config", smoke, "--set", "model.lora.r=0"], 1, &["lora.r is 0, it must be at least 1"]);
    fails(&["train", "--config", smoke, "--device", "gpu"], 1, &["not one of auto, cpu, cuda"]);
    fails(&["ask", "no/model", "question"], 1, &["not in the cache", "`vora download no/model` fetches it"]);
    std::fs::write(path("picture.png"), b"not a picture").unwrap();
    fails(&["ask", "no/model", &path("picture.png"), "question"], 1, &["picture.png", "not a picture"]);
    fails(&["inspect", &path("picture.png")], 1, &["picture.png", "not a whole safetensors file"]);
}

/// By the variables that Python's client reads, as `vora download` does.
#[test]
fn models_are_found_in_the_hubs_cache() {
    let folder = tempfile::tempdir().unwrap();
    for (repo, file) in [("models--tiny", "config.json"), ("models--org--adapter", "adapter_config.json")] {
        let repo = folder.path().join("hub").join(repo);
        std::fs::create_dir_all(repo.join("snapshots/abc")).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        std::fs::write(repo.join("snapshots/abc").join(file), "{}").unwrap();
        let llm = workspace().join("fixtures/tiny/llm/model.safetensors");
        std::fs::copy(llm, repo.join("snapshots/abc/model.safetensors")).unwrap();
    }
    let inspect = |name: &str, vars: &[(&str, &str)]| {
        let mut command = program();
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"] {
            command.env_remove(name);
        }
        command.args(["inspect", name]).env("BASE", folder.path()).envs(vars.iter().copied()).output().unwrap()
    };
    let base = folder.path().to_str().unwrap();
    for vars in [&[("HUGGINGFACE_HUB_CACHE", "$BASE/hub")][..], &[("HF_HOME", "~"), ("HOME", base)]] {
        for name in ["tiny", "org/adapter"] {
            assert!(succeeded(&inspect(name, vars)).contains("model.layers"), "{name}");
        }
    }
    let said = text(&inspect("tiny", &[("HF_HOME", "/no-such-folder")]).stderr);
    assert!(said.contains("`tiny` is no folder, and it is not in the cache /no-such-folder/hub"), "{said}");
    let said = text(&inspect("../tiny", &[("HF_HOME", base)]).stderr);
    assert!(said.contains("`../tiny` is not a model's name on the hub"), "{said}");
}

#[test]
fn an_official_folder_is_merged_and_converted() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let official = "fixtures/golden/official/unmerged";
    succeeded(&vora(&["merge", official, "--out", &path("merged")]));
    succeeded(&vora(&["convert", official, &path("converted"), "--to", "vora"]));
    for name in ["merged", "converted"] {
        let config = std::fs::read(folder.path().join(name).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["lora"]["r"], -1, "{name}"); // its biases are left
        assert!(config.get("auto_map").is_none(), "{name} names Python files that are not in it");
    }
    fails(&["convert", &path("merged"), &path("llm"), "--to", "llm"], 1, &["8 biases", "it runs as `vora`"]);
}

#[test]
fn a_checkpoint_is_converted_and_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let parts = path("parts");
    let convert = |args: &[&str]| succeeded(&vora(&[&["convert"], args].concat()));

    let said = convert(&["fixtures/tiny/llm", &parts, "--max-shard-size", "40KB", "--dry-run"]);
    assert!(said.contains("would write") && said.contains("model.embed_tokens.weight"), "{said}");
    assert!(!folder.path().join("parts").exists());
    let said = convert(&["fixtures/tiny/llm", &parts, "--max-shard-size", "40KB", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&report["from"], &report["to"]), (&"llm".into(), &"llm".into()));
    let files = report["files"].as_array().unwrap();
    assert!(
        files.len() > 1
            && files.iter().all(|file| folder.path().join("parts").join(file["file"].as_str().unwrap()).exists()),
        "{said}"
    );
    assert!(report["tensors"].as_array().unwrap().iter().all(|tensor| tensor["change"] == "kept"), "{said}");
    convert(&[&parts, &path("whole")]);
    let (tiny, whole) = (workspace().join("fixtures/tiny/llm"), folder.path().join("whole"));
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
        assert!(read(&whole) == read(&tiny), "{name}");
    }
    let [before, after] = [&tiny, &whole].map(|folder| vora_torch::checkpoint::Checkpoint::open(folder).unwrap());
    assert!(before.names().eq(after.names()));
    for name in before.names() {
        assert_eq!(before.info(name), after.info(name), "{name}");
        assert!(before.tensor(name).unwrap().equal(&after.tensor(name).unwrap()), "{name}");
    }

    fails(&["convert", &parts, &whole.to_string_lossy()], 1, &["whole is not empty: choose another folder"]);
    fails(&["convert", &parts, &path("x"), "--to", "vora"], 1, &["llm cannot become vora, only llm"]);
    fails(&["convert", &parts, &path("x"), "--to", "ggml"], 2, &["`ggml` is no layout, known are gguf, llm"]);
    fails(&["convert", &parts, &path("x"), "--max-shard-size", "5"], 2, &["as 5GB or 500MiB"]);
    fails(&["convert", &path("nothing"), &path("x")], 1, &["nothing"]);
}

#[test]
fn a_plan_is_told_and_nothing_written() {
    let folder = tempfile::tempdir().unwrap();
    let run = format!("output_dir={}", folder.path().join("run").display());
    let plan = |more: &[&str]| {
        let smoke = "crates/vora-train/recipes/smoke.yaml";
        succeeded(&vora(&[&["train", "--config", smoke, "--plan", "--set", &run], more].concat()))
    };
    let said = plan(&[]);
    assert!(said.contains("trained: adapters") && said.contains("measured on "), "{said}");
    let plan: serde_json::Value = serde_json::from_str(&plan(&["--json"])).unwrap();
    assert!(plan["measured"]["peak_memory"].as_u64().unwrap() > plan["memory"]["masters"].as_u64().unwrap());
    assert!(!folder.path().join("run").exists());
    fails(&["train", "--config", "x.yaml", "--json"], 2, &["--plan"]);
}

#[test]
fn from_training_to_an_answer() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let (run_dir, merged, llm) = (
        run.to_string_lossy(),
        run.join("merged").to_string_lossy().into_owned(),
        run.join("llm").to_string_lossy().into_owned(),
    );
    let output_dir = format!("output_dir={run_dir}");
    let report = succeeded(&vora(&["train", "--config", "crates/vora-train/recipes/smoke.yaml", "--set", &output_dir]));
    assert!(report.contains("exact match") && report.contains("blind"), "{report}");
    for file in ["config.yaml", "metrics.jsonl", "loss.svg", "eval.json", "final/adapter_config.json"] {
        assert!(run.join(file).exists(), "{file}");
    }
    succeeded(&vora(&["report", &run_dir]));
    let page = std::fs::read_to_string(run.join("report.html")).unwrap();
    for part in ["<h2>Accuracy", "<h2>Block maps", "<h2>Answers", "by block", "<dt>machine"] {
        assert!(page.contains(part), "no {part}");
    }
    let out = run.join("page.html").to_string_lossy().into_owned();
    succeeded(&vora(&["report", &run_dir, "--no-answers", "--out", &out]));
    assert!(std::fs::read_to_string(&out).unwrap().contains("<h2>Questions"));
    fails(&["report", "no/run"], 1, &["no/run is no folder of a run: there is no no/run/metrics.jsonl"]);

    let last = run.join("final").to_string_lossy().into_owned();
    let said = succeeded(&vora(&["merge", &last, "--out", &merged, "--llm", &llm, "--check"]));
    let change: f64 =
        said.split("largest change in logits ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    assert!(change < 1e-3, "{said}");
    let places = said.split("the same at ").nth(1).unwrap().split(' ').collect::<Vec<_>>();
    assert!(places[0] == places[2] && places[0] != "0", "{said}");
    fails(&["merge", &last, "--out", &merged], 1, &["already holds a model; choose another --out"]);
    let fresh = run.join("fresh").to_string_lossy().into_owned();
    for (there, said) in
        [(&llm, "already holds a model; choose another --llm"), (&last, "choose another --llm"), (&fresh, "are both")]
    {
        fails(&["merge", &last, "--out", &fresh, "--llm", there], 1, &[said]);
    }
    assert!(!Path::new(&fresh).exists());
    let (results, same) = (run.join("eval.json"), run.join("checkpoints/../eval.json"));
    let (results, same) = (results.to_string_lossy(), same.to_string_lossy());
    fails(&["eval", &merged, "--data", &results, "--out", &same], 1, &["which is read: choose another file"]);
    fails(&["eval", &merged, "--data", &results, "--out", "no/folder/x.json"], 1, &["whose folder is not there"]);
    fails(&["report", &run.to_string_lossy(), "--out", &results], 1, &["is there and no page"]);

    let picture = std::fs::read_dir(run.join("samples")).unwrap().flatten().map(|e| e.path());
    let picture = picture.filter(|p| p.extension().is_some_and(|e| e == "png")).min().unwrap();
    let picture = picture.to_string_lossy();
    let ask = |extra: &[&str]| {
        let question = ["ask", &merged, &picture, "What color?", "--max-new-tokens", "4", "--json"];
        let output = succeeded(&vora(&[&question, extra].concat()));
        serde_json::from_str::<serde_json::Value>(&output).unwrap()
    };
    let greedy = ask(&[]);
    assert_eq!(greedy, ask(&[]));
    assert!(greedy["prompt_tokens"].as_i64().unwrap() > 4, "{greedy}");
    let sampled = ["--temperature", "1", "--top-p", "0.9", "--seed", "3"];
    assert_eq!(ask(&sampled), ask(&sampled));
    let drawn = run.join("drawn.png").to_string_lossy().into_owned();
    let question = ["What color?", "--draw", &drawn, "--max-new-tokens", "2"];
    fails(&[&["ask", &merged, &picture], &question[..]].concat(), 1, &["--draw: the answer tells no box"]);
    fails(
        &[&["ask", &merged, &picture, &picture], &question[..]].concat(),
        1,
        &["--draw takes one picture, there are 2"],
    );

    let parts = succeeded(&vora(&["inspect", &merged]));
    assert!(
        parts.contains("llm.model.layers") && parts.contains("vision_embedding") && !parts.contains("adapter"),
        "{parts}"
    );
    let parts = succeeded(&vora(&["inspect", &last]));
    assert!(parts.contains("adapter of rank"), "{parts}");
}

#[test]
fn the_other_systems_go_the_same_way() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let systems = [
        ("llava", "{type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2}"),
        ("chameleon", "{type: chameleon, llm: fixtures/tiny/llm, image_size: 56, vqmodel: {steps: 2, batch_size: 2}}"),
    ];
    for (name, model) in systems {
        let (run, merged) = (at(name), at(&format!("{name}-merged")));
        let (model, output_dir) = (format!("model={model}"), format!("output_dir={run}"));
        let smoke = "crates/vora-train/recipes/smoke.yaml";
        succeeded(&vora(&["train", "--config", smoke, "--set", &model, "--set", &output_dir, "--set", "max_steps=2"]));
        let said = succeeded(&vora(&["merge", &format!("{run}/final"), "--out", &merged, "--check"]));
        assert!(said.contains("largest change in logits 0"), "{name}: nothing is merged: {said}");
        let picture = format!("{run}/samples/test-0.png");
        let ask = |extra: &[&str]| {
            vora(&[&["ask", &merged, &picture, "What color?", "--max-new-tokens", "60", "--json"], extra].concat())
        };
        let answer: serde_json::Value = serde_json::from_str(&succeeded(&ask(&[]))).unwrap();
        assert!(answer["completion_tokens"].as_u64().unwrap() > 0, "{name}: {answer}");
        let drawn = at("drawn");
        let output = ask(&["--write", "image", "--images-to", &drawn]);
        if name == "chameleon" {
            let written: serde_json::Value = serde_json::from_str(&succeeded(&output)).unwrap();
            let path = written[0]["image"].as_str().unwrap();
            assert!(path.starts_with(&drawn) && std::fs::read(path).unwrap().starts_with(b"\x89PNG"), "{written}");
            let json = |file: &str| -> serde_json::Value {
                serde_json::from_slice(&std::fs::read(Path::new(&merged).join(file)).unwrap()).unwrap()
            };
            let (config, tokenizer) = (json("config.json"), json("tokenizer.json"));
            for token in ["<image>", "IMGIMGBZ"] {
                let mut added = tokenizer["added_tokens"].as_array().unwrap().iter();
                let found = added.find(|added| added["content"] == token).unwrap();
                assert_eq!(found["id"], config["vocabulary_map"][token], "{token}");
            }
        } else {
            assert!(text(&output.stderr).contains("the model writes no pictures"), "{}", text(&output.stderr));
        }
    }
}

/// The weights that a run ended with.
fn trained(run: &Path) -> Vec<Vec<u8>> {
    let files = ["adapter_model.safetensors", "vision.safetensors"];
    files.iter().map(|name| std::fs::read(run.join("final").join(name)).unwrap()).collect()
}

#[test]
fn a_killed_run_resumes_to_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let smoke = "crates/vora-train/recipes/smoke.yaml";
    let train = |run: &Path| {
        let mut command = program();
        command.args(["train", "--config", smoke, "--set", "max_steps=24", "--set", "save_steps=2"]);
        command.args(["--set", &format!("output_dir={}", run.display())]);
        command
    };
    let whole = folder.path().join("whole");
    succeeded(&train(&whole).output().unwrap());

    let killed = folder.path().join("killed");
    let log = killed.join("metrics.jsonl");
    let steps = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    // SIGKILL at whatever it is doing once so many steps are written, twice, then to the end.
    let mut interrupted = 0;
    for at in [5, 13] {
        let mut child = train(&killed).arg("--resume").stderr(std::process::Stdio::null()).spawn().unwrap();
        while steps() < at && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            interrupted += 1;
        }
        child.wait().unwrap();
    }
    assert!(interrupted > 0, "the run was over before it could be killed");
    succeeded(&train(&killed).arg("--resume").output().unwrap());
    assert!(trained(&whole) == trained(&killed), "the resumed run ended with other weights");
}
