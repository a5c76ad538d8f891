//! A Gemma 4 Unified's folder, as HF writes it: asked, kept in its layout, refused where it has what is not built.

use std::path::Path;

use serde_json::{Value, json};
use vora_image::RgbImage;

use super::{fails, succeeded, vora, workspace};

const TINY: &str = "fixtures/tiny/gemma4";

/// A picture of 1:3, in a file.
fn picture(folder: &Path) -> String {
    let bytes = &fixtures::arrays("gemma4_unified")["processor.asked.bytes"]; // [height, width, 3]
    let picture = RgbImage::from_raw(bytes.shape[1] as u32, bytes.shape[0] as u32, bytes.bytes()).unwrap();
    let path = folder.join("picture.png");
    picture.save(&path).unwrap();
    path.to_string_lossy().into_owned()
}

#[test]
fn it_answers_about_a_picture_of_any_shape_as_transformers_does() {
    let folder = tempfile::tempdir().unwrap();
    let (picture, merged) = (picture(folder.path()), folder.path().join("merged").to_string_lossy().into_owned());
    succeeded(&vora(&["merge", TINY, "--out", &merged, "--dtype", "f32"]));
    let golden = std::fs::read(workspace().join("fixtures/golden/gemma4_unified.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    for (question, prompt) in [(&[picture.as_str(), "What is it?"][..], 0), (&["What is it?"], 1)] {
        for model in [TINY, &merged] {
            let args = ["--json", "--max-new-tokens", "8", "--dtype", "f32"];
            let said = succeeded(&vora(&[&["ask", model], question, &args].concat()));
            let said: Value = serde_json::from_str(&said).unwrap();
            assert_eq!(
                said["answer"].as_str().unwrap().trim(),
                golden["prompts"][prompt]["answer"].as_str().unwrap().trim()
            );
        }
    }
}

#[test]
fn what_is_not_built_of_it_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = workspace().join(TINY);
    for entry in std::fs::read_dir(&tiny).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let refused = |file: &str, pointer: &str, value: Value, says: &[&str]| {
        let path = folder.path().join(file);
        let before = std::fs::read(&path).unwrap();
        let mut json: Value = serde_json::from_slice(&before).unwrap();
        let (object, key) = pointer.rsplit_once('/').unwrap();
        json.pointer_mut(object).unwrap()[key] = value;
        std::fs::write(&path, json.to_string()).unwrap();
        fails(&["ask", &folder.path().to_string_lossy(), "What is it?"], 1, says);
        std::fs::write(&path, before).unwrap();
    };
    refused("config.json", "/audio_config", json!({}), &["config.json", "audio_config: sounds are not heard here"]);
    refused("config.json", "/text_config/enable_moe_block", json!(true), &["enable_moe_block is true: experts"]);
    let per_layer = "/text_config/hidden_size_per_layer_input";
    refused("config.json", per_layer, json!(16), &["hidden_size_per_layer_input is 16: embeddings by layer"]);
    let tokens = "/image_processor/max_soft_tokens";
    refused("processor_config.json", tokens, json!(5), &["max_soft_tokens is 5, Gemma 4's processor takes 70, 140"]);
    let class = "/image_processor/image_processor_type";
    refused(
        "processor_config.json",
        class,
        json!("Gemma4ImageProcessor"),
        &["is not one of Bit, CLIP", "Gemma4Unified"],
    );
    let pooling = "/image_processor/pooling_kernel_size";
    let differs = "takes 6 x 6 pixels for a token, its model does not: their patch_size and pooling_kernel_size differ";
    refused("processor_config.json", pooling, json!(3), &[differs]);
    refused(
        "processor_config.json",
        "/image_processor/do_pad",
        json!(true),
        &["do_pad is true, only LlavaImageProcessor's"],
    );
}

#[test]
fn a_run_file_that_names_such_a_folder_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = workspace().join(TINY);
    for entry in std::fs::read_dir(&tiny).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let llm = format!("model.llm={}", folder.path().display());
    let run = format!("output_dir={}", folder.path().join("run").display());
    let refused = |more: &str, says: &[&str]| {
        let smoke = "crates/vora-train/recipes/gemma4-smoke.yaml";
        fails(&["train", "--config", smoke, "--set", &llm, "--set", &run, "--set", more], 1, says);
    };
    refused("model.max_image_tokens=0", &["max_image_tokens is 0, Gemma 4's processor takes 70, 140"]);
    refused("model.train=[vision_tower]", &["model.train has vision_tower, which is a LLaVA's"]);
    refused("model.lora.target_modules=[experts]", &["experts"]);
    let change = |file: &str, pointer: &str, value: Value| {
        let path = folder.path().join(file);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let (object, key) = pointer.rsplit_once('/').unwrap();
        json.pointer_mut(object).unwrap()[key] = value;
        std::fs::write(&path, json.to_string()).unwrap();
    };
    change("processor_config.json", "/image_processor/pooling_kernel_size", json!(3));
    refused("seed=1", &["model.llm", "an image processor that takes 6 x 6 pixels for a token", "of 4 x 4 pixels"]);
    change("config.json", "/text_config/enable_moe_block", json!(true));
    refused("seed=1", &["model.llm", "enable_moe_block is true: experts"]);
}

/// A picture larger than the budget is made smaller, and that is said once; a sliver is a row of tokens.
#[test]
fn pictures_beyond_the_budget_are_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, width, height| {
        let path = folder.path().join(name);
        RgbImage::from_fn(width, height, |x, y| [x as u8, y as u8, 9].into()).save(&path).unwrap();
        path.to_string_lossy().into_owned()
    };
    let (large, wide, sliver) = (save("a.png", 90, 90), save("b.png", 300, 100), save("c.png", 400, 2));
    let ask = |pictures: &[&str]| {
        let args = [&["ask", TINY], pictures, &["What is it?", "--json", "--max-new-tokens", "2"]].concat();
        let output = vora(&args);
        let said: Value = serde_json::from_str(&succeeded(&output)).unwrap();
        (said["prompt_tokens"].as_u64().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (_, told) = ask(&[&large, &wide]);
    assert_eq!(told.matches("pictures larger than max_soft_tokens (70 tokens of 4 x 4 pixels)").count(), 1, "{told}");
    let ((with, told), (without, _)) = (ask(&[&sliver]), ask(&[]));
    assert_eq!(told, "");
    assert_eq!(with - without, 70 + 2); // 1:200 is one row of the most tokens, and a mark at either end
}

/// From a run file to a merged folder, which is asked, and compared with what it was.
#[test]
fn a_run_is_merged_and_keeps_its_language() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (run, left, merged) = (format!("output_dir={}", path("run")), path("run/final"), path("merged"));
    let smoke = "crates/vora-train/recipes/gemma4-smoke.yaml";
    let few = ["--set", "max_steps=1", "--set", "data.eval={}", "--set", "evaluation_strategy=no"];
    succeeded(&vora(&[&["train", "--config", smoke, "--set", &run], &few[..]].concat()));
    succeeded(&vora(&["merge", &left, "--out", &merged, "--check"]));
    let picture = picture(folder.path());
    for model in [&left, &merged] {
        let said = succeeded(&vora(&["ask", model, &picture, "What is it?", "--json", "--max-new-tokens", "4"]));
        assert!(serde_json::from_str::<Value>(&said).unwrap()["prompt_tokens"].as_u64().unwrap() > 20);
        let said = succeeded(&vora(&["eval", model, "--language", "--json"]));
        let ratio = serde_json::from_str::<Value>(&said).unwrap()["ratio"].as_f64().unwrap();
        assert!((0.9..1.1).contains(&ratio), "{ratio}");
    }
}
