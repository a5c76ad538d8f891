//! Adapters that act on some tokens alone: trained, opened, merged, converted.

use std::path::Path;

use serde_json::Value;

use super::{fails, succeeded, text, vora};

/// Trains with the smoke recipe, `set` over it; the folder of what was trained.
fn train(folder: &Path, set: &[&str]) -> String {
    let output_dir = format!("output_dir={}", folder.display());
    let mut args = vec!["train", "--config", "crates/vora-train/recipes/smoke.yaml"];
    let common = [&*output_dir, "evaluation_strategy=no", "save_steps=1000", "max_steps=4", "learning_rate=2e-2"];
    for set in set.iter().chain(&common) {
        args.extend(["--set", set]);
    }
    succeeded(&vora(&args));
    folder.join("final").to_string_lossy().into_owned()
}

/// What a model keeps of its LLM's language: perplexity over the LLM's, and chats that are the same.
fn language(model: &str, extra: &[&str]) -> (f64, u64) {
    let output = vora(&[&["eval", model, "--language", "--json", "--dtype", "f32"], extra].concat());
    let found: Value = serde_json::from_str(&succeeded(&output)).unwrap();
    (found["ratio"].as_f64().unwrap(), found["same_chats"].as_u64().unwrap())
}

fn says(model: &str, extra: &[&str]) -> String {
    let picture = "fixtures/images/rgb.png";
    let ask = ["ask", model, picture, "What shape?", "--max-new-tokens", "8", "--dtype", "f32", "--json"];
    let answer: Value = serde_json::from_str(&succeeded(&vora(&[&ask, extra].concat()))).unwrap();
    answer["answer"].to_string()
}

#[test]
fn a_picture_switches_adapters_on() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let anchor = "text_anchor={texts: 4, tokens: 16, max_length: 16}";
    let last = train(&folder.path().join("run"), &["model.lora.answers_on=with_image", anchor]);

    // Without a picture it is the LLM that it was; everywhere its adapters change what it says.
    assert_eq!(language(&last, &[]), (1.0, 20));
    let (everywhere, _) = language(&last, &["--acts-on", "all"]);
    assert!((everywhere - 1.0).abs() > 1e-4, "{everywhere}");
    assert_eq!(says(&last, &[]), says(&last, &["--acts-on", "all"]));
    // The LLM's own folder says the same, and takes no picture.
    let hello = |model: &str| succeeded(&vora(&["ask", model, "Hello?", "--dtype", "f32", "--max-new-tokens", "8"]));
    assert_eq!(hello("fixtures/tiny/llm"), hello(&last));
    assert!(!hello(&last).trim().is_empty());
    fails(
        &["ask", "fixtures/tiny/llm", "fixtures/images/rgb.png", "What?"],
        1,
        &["language model alone", "no picture"],
    );
    let kept: Value = serde_json::from_slice(&std::fs::read(folder.path().join("run/language.json")).unwrap()).unwrap();
    assert!(kept["perplexity"] != kept["base_perplexity"], "{kept}");

    fails(&["merge", &last, "--out", &at("merged")], 1, &["act on `with_image`", "--as seeing", "--as apart"]);
    succeeded(&vora(&["merge", &last, "--out", &at("seeing"), "--as", "seeing", "--dtype", "f32", "--check"]));
    succeeded(&vora(&["merge", &last, "--out", &at("apart"), "--as", "apart", "--dtype", "f32"]));
    assert!((language(&at("seeing"), &[]).0 - everywhere).abs() < 1e-3);
    assert_eq!(language(&at("apart"), &[]), (1.0, 20));
    assert_eq!(says(&at("apart"), &[]), says(&last, &[]));
    fails(&["ask", &at("seeing"), "Hello?", "--acts-on", "with_image"], 1, &["--acts-on: the adapters are merged"]);
    fails(
        &["merge", &last, "--out", &at("x"), "--as", "apart", "--check"],
        1,
        &["--as apart and --as base merge nothing"],
    );
    fails(&["ask", &last, "Hello?", "--acts-on", "words"], 2, &["`words` is none of all, with_image, image_tokens"]);

    fails(&["convert", &last, &at("vora"), "--to", "vora"], 1, &["act on `with_image`", "--as seeing"]);
    let told = vora(&["convert", &at("apart"), &at("peft"), "--to", "peft"]);
    succeeded(&told);
    assert!(text(&told.stderr).contains("PEFT has no word"), "{}", text(&told.stderr));
}

#[test]
fn adapters_of_picture_tokens_never_act_on_words() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let last = train(&folder.path().join("run"), &["model.lora.acts_on=image_tokens"]);
    assert_eq!(language(&last, &[]), (1.0, 20));
    fails(&["ask", &last, "Hello?", "--acts-on", "all"], 1, &["trained through `image_tokens` cannot act on `all`"]);
    fails(&["merge", &last, "--out", &at("m"), "--as", "seeing"], 1, &["through the tokens of pictures alone"]);
    fails(&["merge", &last, "--out", &at("m")], 1, &["--as apart"]);
    succeeded(&vora(&["merge", &last, "--out", &at("apart"), "--as", "apart"]));
    // A run that goes on is of the same rule.
    let run = format!("output_dir={}", folder.path().join("run").display());
    let smoke = "crates/vora-train/recipes/smoke.yaml";
    let resumed = ["train", "--config", smoke, "--resume", "--set", &run, "--set", "max_steps=5"];
    fails(&resumed, 1, &["cannot resume", "model.lora.acts_on"]);
}
