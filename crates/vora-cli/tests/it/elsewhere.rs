//! What a run leaves, opened from another place than the run's, and after it has moved.

use std::path::Path;
use std::process::Output;

use super::{program, succeeded, text, workspace};

/// The program in `folder`, which finds no hub.
fn vora_in(folder: &Path, args: &[&str]) -> Output {
    program().current_dir(folder).args(args).env("HF_HUB_CACHE", "no-such-cache").output().unwrap()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Runs with a model's paths from the folder that they are started in, and opens what they leave here and elsewhere.
fn opens_from_anywhere(model: &str, models: &[&str]) {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().canonicalize().unwrap();
    let (work, other) = (root.join("work"), root.join("other"));
    std::fs::create_dir(&other).unwrap();
    for name in models {
        copy(&workspace().join("fixtures/tiny").join(name), &work.join("models").join(name));
    }
    let recipe = workspace().canonicalize().unwrap().join("crates/vora-train/recipes/smoke.yaml");
    let recipe = recipe.to_str().unwrap();
    let set = ["max_steps=1", "output_dir=runs/x", "data.eval={}", model].map(|entry| ["--set", entry]);
    let args = [&["train", "--config", recipe][..], &set.concat()].concat();
    succeeded(&vora_in(&work, &args));
    let merges = |end: &str, out: &str| {
        succeeded(&vora_in(&other, &["merge", end, "--out", out, "--as", "seeing"]));
        let config = text(&std::fs::read(other.join(out).join("config.json")).unwrap());
        assert!(!config.contains("paths_from_here"), "{config}");
    };
    merges("../work/runs/x/final", "from-elsewhere");
    // The whole model is counted, and what of it is trained.
    let counted = |path: &str| -> serde_json::Value {
        serde_json::from_str(&succeeded(&vora_in(&other, &["inspect", path, "--json"]))).unwrap()
    };
    let number = |counted: &serde_json::Value, key: &str| counted["groups"]["total"][key].as_i64().unwrap();
    let (run, llm) = (counted("../work/runs/x/final"), counted("../work/models/llm"));
    let adapter = counted("../work/runs/x/final/adapter_model.safetensors");
    let vision = counted("../work/runs/x/final/vision.safetensors");
    let trained = number(&adapter, "parameters") + number(&vision, "parameters");
    let tower = model.contains("vision_tower").then(|| number(&counted("../work/models/dinov2"), "parameters"));
    let frozen = number(&llm, "parameters") + tower.unwrap_or(0);
    assert_eq!((number(&run, "parameters"), number(&run, "trained")), (frozen + trained, trained));
    assert_eq!(run["groups"]["model.layers"]["trained"], 0);
    let table = succeeded(&vora_in(&other, &["inspect", "../work/runs/x/final"]));
    assert!(table.contains("trained") && table.contains("model.embed_tokens"), "{table}");
    // PEFT takes the LLM by the whole path.
    let adapter = text(&std::fs::read(work.join("runs/x/final/adapter_config.json")).unwrap());
    let base = format!("\"base_model_name_or_path\": {:?}", work.join("models/llm").to_str().unwrap());
    assert!(adapter.contains(&base), "{adapter}");
    // What the run left alone elsewhere, then all of it.
    copy(&work.join("runs/x/final"), &root.join("away/final"));
    merges("../away/final", "alone");
    std::fs::rename(&work, root.join("moved")).unwrap();
    merges("../moved/runs/x/final", "moved");
    let output = vora_in(&other, &["merge", "../away/final", "--out", "none", "--as", "seeing"]);
    let said = text(&output.stderr);
    let tried = [&format!("`{}", work.join("models").display()), "is not there, nor is ../away/final/", "config.json"];
    assert!(!output.status.success() && tried.iter().all(|part| said.contains(part)), "{said}");
}

#[test]
fn a_vora_opens_from_anywhere() {
    let model = "{llm: models/llm, aux_vision: models/dinov2, patch_size: 14, image_size: 56, lora: {layers: 2, r: 4}}";
    opens_from_anywhere(&format!("model={model}"), &["llm", "dinov2"]);
}

#[test]
fn a_llava_opens_from_anywhere() {
    let model = "{type: llava, llm: models/llm, vision_tower: models/dinov2, image_size: 56, lora: {layers: 2, r: 4}}";
    opens_from_anywhere(&format!("model={model}"), &["llm", "dinov2"]);
}
