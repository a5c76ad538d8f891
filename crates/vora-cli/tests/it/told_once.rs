//! What files disagree about is told once by a program, however often it opens them.

use std::path::Path;

use serde_json::{Value, json};
use tch::Tensor;

use super::{succeeded, text, vora, workspace};

/// The tiny LLM in `folder`, whose files disagree in four ways, and a class of HF transformers with its tokenizer.
fn disagreeing_llm(folder: &Path) {
    let tiny = workspace().join("fixtures/tiny/llm");
    for name in ["config.json", "generation_config.json", "chat_template.jinja"] {
        std::fs::copy(tiny.join(name), folder.join(name)).unwrap();
    }
    let write = |name: &str, json: &Value| std::fs::write(folder.join(name), json.to_string()).unwrap();
    write("special_tokens_map.json", &json!({"eos_token": "<|endoftext|>"}));
    let read = |name: &str| serde_json::from_slice::<Value>(&std::fs::read(tiny.join(name)).unwrap()).unwrap();
    let mut config = read("tokenizer_config.json");
    config["tokenizer_class"] = "GPT2Tokenizer".into();
    write("tokenizer_config.json", &config);
    let mut tokenizer = read("tokenizer.json");
    tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({"id": 600, "content": "<loc>", "special": true,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}));
    write("tokenizer.json", &tokenizer);
    write("model.safetensors.index.json", &json!({"weight_map": {}}));
    let mut tensors = Tensor::read_safetensors(tiny.join("model.safetensors")).unwrap();
    let embedding = tensors.iter().find(|(name, _)| name == "model.embed_tokens.weight").unwrap().1.copy();
    tensors.push(("lm_head.weight".to_owned(), embedding + 1.0));
    Tensor::write_safetensors(&tensors, folder.join("model.safetensors")).unwrap();
}

#[test]
fn what_files_disagree_about_is_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let (llm, run) = (folder.path().join("llm"), folder.path().join("run"));
    std::fs::create_dir(&llm).unwrap();
    disagreeing_llm(&llm);
    let of_tokenizer = [
        "eos_token is `<|im_end|>` in tokenizer_config.json",
        "the added token `<loc>` the id 600",
        "tokenizer.json: GPT2Tokenizer of transformers 5 has another pre_tokenizer; the file is read as it stands",
    ];
    let of_weights =
        ["has model.safetensors and model.safetensors.index.json", "the config ties the head to the embedding, but"];

    let set = [format!("model.llm={}", llm.display()), format!("output_dir={}", run.display())];
    let set = ["--set", &set[0], "--set", &set[1], "--set", "max_steps=2", "--set", "save_steps=1"];
    let smoke = "crates/vora-train/recipes/smoke.yaml";
    let trained = run.join("final").to_string_lossy().into_owned();
    let merged = folder.path().join("merged").to_string_lossy().into_owned();
    let runs: [(&[&str], &[&str]); 5] = [
        (&["data", "show", smoke, "--count", "20"], &of_tokenizer),
        (&["train", "--config", smoke], &[&of_tokenizer[..], &of_weights].concat()),
        (&["merge", &trained, "--out", &merged, "--check"], &[&of_tokenizer[..], &of_weights[..1]].concat()),
        (&["ask", &merged, "Is it red?", "--max-new-tokens", "2"], &of_tokenizer),
        (&["eval", &merged, "--data", "scenes:test", "--limit", "4"], &of_tokenizer),
    ];
    for (args, remarks) in runs {
        let set = if ["data", "train"].contains(&args[0]) { &set[..] } else { &[] };
        let output = vora(&[args, set].concat());
        succeeded(&output);
        let said = text(&output.stderr);
        for remark in remarks {
            let lines = said.lines().filter(|line| line.contains(remark));
            assert_eq!(lines.count(), 1, "`{remark}` of vora {}:\n{said}", args[0]);
        }
    }
}
