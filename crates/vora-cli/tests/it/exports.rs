//! Folders and files for other programs: HF transformers, llama.cpp.

use serde_json::Value;
use vora_torch::checkpoint::Checkpoint;

use super::{fails, succeeded, vora, workspace};

#[test]
fn a_merged_folder_for_transformers_answers_as_the_plain_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (run, last) = (path("run"), path("run/final"));
    let smoke = "crates/vora-train/recipes/smoke.yaml";
    succeeded(&vora(&["train", "--config", smoke, "--set", &format!("output_dir={run}"), "--set", "max_steps=1"]));
    succeeded(&vora(&["merge", &last, "--out", &path("plain")]));
    succeeded(&vora(&["merge", &last, "--out", &path("hf"), "--hf"]));
    succeeded(&vora(&["convert", &path("plain"), &path("converted"), "--hf"]));
    let read = |name: &str, file: &str| std::fs::read(folder.path().join(name).join(file)).unwrap();
    let json = |name: &str, file: &str| serde_json::from_slice::<Value>(&read(name, file)).unwrap();
    for name in ["hf", "converted"] {
        assert_eq!(json(name, "config.json")["auto_map"]["AutoModelForCausalLM"], "modeling_vora.VoRAForCausalLM");
        // The tiny vocabulary has no token for a picture: the next one is added to it there.
        assert_eq!(json(name, "config.json")["image_token_id"], 512);
        assert_eq!(json(name, "processor_config.json")["image_token_id"], 512);
        for file in ["configuration_vora.py", "modeling_vora.py", "processing_vora.py", "model.safetensors"] {
            assert!(read(name, file) == read("hf", file), "{name}/{file}");
        }
        let picture = format!("{run}/samples/test-0.png");
        for question in [&[picture.as_str(), "What color?"][..], &["What color?"]] {
            let ask = |name: &str| {
                succeeded(&vora(&[&["ask", &path(name)], question, &["--json", "--max-new-tokens", "4"]].concat()))
            };
            assert_eq!(ask(name), ask("plain"), "{name}: {question:?}");
        }
    }
    fails(
        &["merge", &last, "--out", &path("other"), "--hf", "--as", "apart"],
        1,
        &["leave out --check, --llm and --hf"],
    );
    std::fs::create_dir(path("other")).unwrap();
    std::fs::write(path("other/modeling_vora.py"), "").unwrap();
    let there = ["other/modeling_vora.py is there already, and --hf would write it"];
    fails(&["merge", &last, "--out", &path("other"), "--hf"], 1, &there);
    fails(&["convert", "fixtures/tiny/llm", &path("x"), "--hf"], 1, &["--hf is for a VoRA whose adapters are merged"]);
    let unmerged = "fixtures/golden/official/unmerged";
    fails(&["convert", unmerged, &path("x"), "--hf"], 1, &["becomes vora-unmerged"]);
    assert!(!folder.path().join("x").exists());
}

/// The tiny vocabulary has 512 tokens and none for a picture, which the processor of HF's LLaVA cannot do without.
#[test]
fn a_llava_for_transformers_has_a_token_for_pictures() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (run, last) = (path("run"), path("run/final"));
    let model = "model={type: llava, llm: fixtures/tiny/llm, image_size: 56, vision_tower: fixtures/tiny/dinov2}";
    let (smoke, output) = ("crates/vora-train/recipes/smoke.yaml", format!("output_dir={run}"));
    let set = ["--set", model, "--set", "distill={}", "--set", "max_steps=1", "--set", &output];
    succeeded(&vora(&[&["train", "--config", smoke][..], &set].concat()));
    succeeded(&vora(&["merge", &last, "--out", &path("plain")]));
    succeeded(&vora(&["merge", &last, "--out", &path("hf"), "--hf"]));
    let json = |file: &str| -> Value {
        serde_json::from_slice(&std::fs::read(folder.path().join("hf").join(file)).unwrap()).unwrap()
    };
    let config = json("config.json");
    assert_eq!((&config["image_token_index"], &config["text_config"]["vocab_size"]), (&512.into(), &513.into()));
    let tokenizer = json("tokenizer.json");
    let added = tokenizer["added_tokens"].as_array().unwrap().last().unwrap();
    assert_eq!((&added["content"], &added["id"], &added["special"]), (&"<image>".into(), &512.into(), &true.into()));
    let processor = json("processor_config.json");
    let expected: [(&str, Value); 3] =
        [("image_token", "<image>".into()), ("patch_size", 14.into()), ("num_additional_image_tokens", 1.into())];
    assert!(expected.iter().all(|(key, value)| processor[key] == *value), "{processor}");
    let rows = |name: &str| {
        let checkpoint = Checkpoint::open(&folder.path().join(name)).unwrap();
        checkpoint.info("language_model.model.embed_tokens.weight").unwrap().1.to_vec()
    };
    assert_eq!((rows("plain")[0], rows("hf")[0]), (512, 513));
    let picture = format!("{run}/samples/test-0.png");
    for question in [&[picture.as_str(), "What color?"][..], &["What color?"]] {
        let ask = |name: &str| {
            succeeded(&vora(&[&["ask", &path(name)], question, &["--json", "--max-new-tokens", "4"]].concat()))
        };
        assert_eq!(ask("hf"), ask("plain"), "{question:?}");
    }
    // A folder that has the token keeps it.
    succeeded(&vora(&["merge", &path("hf"), "--out", &path("again"), "--hf"]));
    let files = ["tokenizer.json", "config.json", "chat_template.jinja", "model.safetensors"];
    for file in files {
        let read = |name: &str| std::fs::read(folder.path().join(name).join(file)).unwrap();
        assert!(read("again") == read("hf"), "{file}");
    }
}

#[test]
fn a_model_in_few_bits_runs_as_it_did() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let tiny = "fixtures/tiny/llm";
    for (width, bits) in [("int8", 8), ("int4", 4)] {
        let out = path(width);
        let said = succeeded(&vora(&["quantize", tiny, "--out", &out, "--weights", width]));
        assert!(said.contains("quantized model") && said.contains("times the LLM's"), "{said}");
        let config = std::fs::read(folder.path().join(width).join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"], bits);
        succeeded(&vora(&["ask", &out, "Why?", "--max-new-tokens", "4"]));
        let said = succeeded(&vora(&["inspect", &out, "--tensors"]));
        assert!(said.contains("model.layers.0.self_attn.q_proj.weight_packed"), "{said}");
        let parameters = |model: &str| {
            let said = succeeded(&vora(&["inspect", model, "--json"]));
            serde_json::from_str::<Value>(&said).unwrap()["groups"]["total"]["parameters"].as_i64().unwrap()
        };
        assert_eq!(parameters(&out), parameters(tiny));
        fails(&["quantize", &out, "--out", &path("x"), "--weights", "int8"], 1, &["are in few bits already"]);
        fails(&["quantize", tiny, "--out", &out, "--weights", width], 1, &["already holds a model"]);
        fails(&["convert", &out, &path("x"), "--to", "gguf"], 1, &["are in few bits", "quantized from"]);
    }
    fails(&["quantize", tiny, "--out", &path("x"), "--weights", "bf16"], 2, &["bf16 is not quantised: int8 or int4"]);
    fails(&["quantize", "nowhere", "--out", &path("x"), "--weights", "int8"], 1, &["nowhere"]);
    let unmerged = "fixtures/golden/official/unmerged";
    fails(&["quantize", unmerged, "--out", &path("x"), "--weights", "int8"], 1, &["`vora merge` first"]);
    assert!(!folder.path().join("x").exists());
}

#[test]
fn a_language_model_becomes_a_gguf_file_and_one_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let tiny = "fixtures/tiny/llm";
    for dtype in ["f32", "q8_0"] {
        let (file, back) = (path(dtype), path(&format!("{dtype}-back")));
        let said = succeeded(&vora(&["convert", tiny, &file, "--to", "gguf", "--dtype", dtype]));
        assert!(said.contains("blk.0.attn_q.weight") && said.contains("model.gguf  38 tensors"), "{said}");
        succeeded(&vora(&["convert", &file, &back]));
        let [before, after] = [workspace().join(tiny), folder.path().join(format!("{dtype}-back"))]
            .map(|path| Checkpoint::open(&path).unwrap());
        assert!(before.names().eq(after.names()));
        for name in before.names() {
            let [before, after] = [&before, &after].map(|checkpoint| checkpoint.tensor(name).unwrap());
            let largest = (&before - &after).abs().max().double_value(&[]);
            // Half of one of 127 steps to the largest number of a block, and what the scale loses in f16.
            let bound = if dtype == "f32" || before.dim() == 1 {
                0.0
            } else {
                before.abs().max().double_value(&[]) * (0.5 / 127.0 + 0.5f64.powi(11))
            };
            assert!(largest <= bound, "{dtype}: {name} is off by {largest}");
        }
    }
    // Its blocks are what decoding reads, of a folder and as --weights names them; as --weights bf16 they are made whole.
    let turn = |text: &str| {
        format!(r#"{{"conversations": [{{"from": "human", "value": "{text}"}}, {{"from": "gpt", "value": "yes"}}]}}"#)
    };
    std::fs::write(path("words.jsonl"), [turn("Hello?"), turn("Is it red, or is it blue?")].join("\n")).unwrap();
    for (dtype, own, other) in [("q8_0", "int8", "int4"), ("q4_0", "int4", "int8")] {
        let file = path(&format!("{dtype}-asked"));
        succeeded(&vora(&["convert", tiny, &file, "--to", "gguf", "--dtype", dtype]));
        let data = path("words.jsonl");
        let asked = ["--dtype", "f32", "--data", &data, "--max-tokens", "8", "--json"];
        let eval = |weights: &[&str]| vora(&[&["eval", &file], &asked[..], weights].concat());
        let answers = |weights: &[&str]| {
            let out = path("answers.json");
            succeeded(&eval(&[weights, &["--out", &out]].concat()));
            let json: serde_json::Value = serde_json::from_slice(&std::fs::read(out).unwrap()).unwrap();
            json["answers"].as_array().unwrap().iter().map(|answer| answer["answer"].clone()).collect::<Vec<_>>()
        };
        let kept = answers(&[]);
        assert_eq!(kept, answers(&["--weights", own]), "{dtype}");
        assert_eq!(answers(&["--weights", "bf16"]).len(), kept.len());
        let refused = eval(&["--weights", other]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("in few bits already, of another kind"), "{said}");
        let ask = succeeded(&vora(&["ask", &file, "Hello?", "--dtype", "f32", "--max-new-tokens", "8"]));
        assert_eq!(format!("{}\n", kept[0].as_str().unwrap()), ask, "{dtype}: `ask` answers as `eval`");
        let itself = format!("{file}/model.gguf");
        assert_eq!(ask, succeeded(&vora(&["ask", &itself, "Hello?", "--dtype", "f32", "--max-new-tokens", "8"])));
    }
    fails(&["convert", tiny, &path("x"), "--to", "mmproj"], 1, &["llm cannot become mmproj"]);
    fails(&["convert", tiny, &path("x"), "--dtype", "q4_0"], 1, &["--to gguf and --to mmproj write one"]);
    fails(
        &["convert", "fixtures/tiny/dinov2", &path("x"), "--to", "gguf"],
        1,
        &["no language model, LLaVA or VoRA", "cannot become gguf"],
    );
    std::fs::create_dir(path("bare")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(workspace().join(tiny).join(name), folder.path().join("bare").join(name)).unwrap();
    }
    fails(&["convert", &path("bare"), &path("x"), "--to", "gguf"], 1, &["bare has no tokenizer.json"]);
    assert!(!folder.path().join("x").exists());
}
