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
}
