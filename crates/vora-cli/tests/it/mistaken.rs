//! What is taken for something else, and what is larger than it can be: told by name, in one line.

use std::path::Path;

use super::{fails, succeeded, text, vora, workspace};

/// A copy of the tiny LLM without some of its files.
fn llm(folder: &Path, without: &[&str]) -> String {
    std::fs::create_dir_all(folder).unwrap();
    for entry in std::fs::read_dir(workspace().join("fixtures/tiny/llm")).unwrap() {
        let entry = entry.unwrap();
        if !without.iter().any(|name| entry.file_name().to_string_lossy().starts_with(name)) {
            std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }
    folder.to_string_lossy().into_owned()
}

#[test]
fn what_is_no_model_is_called_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let adapter = "fixtures/golden/lora_peft";
    let alone = ["lora_peft is an adapter without its model: `vora convert` merges the two", "--lora-modules"];
    fails(&["ask", adapter, "Why?"], 1, &alone);
    fails(&["merge", adapter, "--out", &path("out"), "--as", "seeing"], 1, &alone);
    let unnamed = ["names no base_model_name_or_path: --base DIR says which"];
    fails(&["convert", adapter, &path("out")], 1, &unnamed);
    let nowhere = path("nowhere");
    fails(&["report", &nowhere], 1, &["nowhere is no folder of a run: there is no ", "metrics.jsonl"]);
    let smoke =
        ["train", "--config", "crates/vora-train/recipes/smoke.yaml", "--set", "model.llm=fixtures/tiny/dinov2"];
    fails(&[&smoke[..], &["--plan"]].concat(), 1, &["model.llm: in fixtures/tiny/dinov2/config.json", "`dinov2`"]);
    let archive = path("model.tar.gz");
    std::fs::write(&archive, b"\x1f\x8b\x08\0").unwrap();
    fails(&["ask", &archive, "Why?"], 1, &["model.tar.gz` is a file: a model is a folder", "unpacked first"]);
    fails(&["inspect", &archive], 1, &["model.tar.gz is compressed (gzip)", "`gunzip "]);
    let packed = llm(&folder.path().join("packed"), &["model"]);
    std::fs::write(Path::new(&packed).join("model.safetensors.gz"), b"\x1f\x8b\x08\0").unwrap();
    fails(&["ask", &packed, "Why?"], 1, &["holds weights only in model.safetensors.gz: unpack it first"]);
    fails(&["eval", "fixtures/tiny/llm", "--text", &archive], 1, &["is compressed (gzip), and text is read as it is"]);
}

#[test]
fn what_is_larger_than_it_can_be_is_refused_at_once() {
    let llm = "fixtures/tiny/llm";
    fails(&["bench", llm, "--batch", "1,1000000"], 1, &["--batch is 1000000, it must be 4096 or less"]);
    let many = ["eval", llm, "--data", "scenes:test", "--limit", "99999999999"];
    fails(&many, 1, &["a limit of 99999999999 pictures, of scenes it is 100000 or less"]);
}

#[test]
fn a_weight_that_is_no_number_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let llm = llm(&folder.path().join("llm"), &[]);
    let file = Path::new(&llm).join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let start = 8 + usize::try_from(u64::from_le_bytes(whole[..8].try_into().unwrap())).unwrap();
    let header: serde_json::Value = serde_json::from_slice(&whole[8..start]).unwrap();
    for (name, number) in [("model.layers.1.mlp.up_proj.weight", f32::NAN), ("model.norm.weight", f32::INFINITY)] {
        let at = start + usize::try_from(header[name]["data_offsets"][0].as_u64().unwrap()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
        std::fs::write(&file, bytes).unwrap();
        let said = [&format!("the weight `{name}` has numbers that are not finite")[..]];
        fails(&["ask", &llm, "Why?", "--dtype", "f32"], 1, &said);
        let out = folder.path().join("out").to_string_lossy().into_owned();
        let named = [&format!("the weight `{name}` of ")[..], "has numbers that are not finite"];
        fails(&["quantize", &llm, "--out", &out, "--weights", "int8"], 1, &named);
        assert!(!Path::new(&out).exists());
    }
}

#[test]
fn a_folder_with_weights_and_little_else_is_quantized() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let bare = llm(&folder.path().join("bare"), &["tokenizer", "chat", "generation", "special"]);
    let said = succeeded(&vora(&["quantize", &bare, "--out", &path("bare-int8"), "--weights", "int8"]));
    assert!(said.contains("what the few bits cost is not measured: "), "{said}");
    // A GGUF file has all of it.
    succeeded(&vora(&["convert", "fixtures/tiny/llm", &path("gguf"), "--to", "gguf"]));
    succeeded(&vora(&["quantize", &path("gguf"), "--out", &path("int8"), "--weights", "int8"]));
    let answer = |model: &str| text(&vora(&["ask", model, "Why?", "--max-new-tokens", "5"]).stdout);
    assert!(!answer(&path("int8")).is_empty());
    let smoke = "crates/vora-train/recipes/smoke.yaml";
    let (llm, run) = (format!("model.llm={}", path("gguf")), format!("output_dir={}", path("run")));
    let set = [&llm, &run, "max_steps=1", "data.eval={}"].map(|entry| ["--set", entry]);
    succeeded(&vora(&[&["train", "--config", smoke][..], &set.concat()].concat()));
    assert_eq!(answer(&path("run/final")), answer(&path("gguf")), "without a picture it is the LLM, of one step");
}
