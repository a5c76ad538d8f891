//! Adapters that PEFT made, merged as PEFT merges them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use fixtures::{Golden, assert_close_to};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use vora_llm::{AttentionPlan, CausalLm, LlmConfig, VisionAttention};
use vora_text::Spans;
use vora_torch::checkpoint::{Checkpoint, save};
use vora_torch::weights::Weights;

use vora_model::convert::{Conversion, Layout, Options, Report};
use vora_model::{Llava, LlavaConfig};

fn save_folder(folder: &Path, config: &Value, tensors: &[(String, Tensor)]) -> Result<()> {
    fs::create_dir_all(folder)?;
    save(&folder.join("model.safetensors"), tensors, &[])?;
    Ok(fs::write(folder.join("config.json"), config.to_string())?)
}

fn convert(from: &Path, destination: &Path, to: Option<Layout>, base: &Path) -> Result<Report> {
    let conversion = Conversion::plan(from, &Options::default().with_layout(to), &|_| Ok(base.to_owned()))?;
    conversion.write(destination)?;
    Ok(conversion.report())
}

/// What PEFT made: bases, adapters, and what it wrote once they were merged.
struct Peft {
    golden: Golden,
    json: Value,
    root: tempfile::TempDir,
}

impl Peft {
    fn open() -> Self {
        let json = fs::read(fixtures::root().join("golden/peft_merged.json")).unwrap();
        let json: Value = serde_json::from_slice(&json).unwrap();
        let peft = Self { golden: fixtures::open("peft_merged"), json, root: tempfile::tempdir().unwrap() };
        for (name, config) in peft.json["bases"].as_object().unwrap() {
            save_folder(&peft.at(name), config, &peft.golden.under(&format!("base.{name}."))).unwrap();
        }
        peft
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn cases(&self, base: &str) -> Vec<String> {
        let cases = self.json["cases"].as_object().unwrap().iter().filter(|(_, case)| case["base"] == base);
        cases.map(|(name, _)| name.clone()).collect()
    }

    /// The folder of a case's adapter, with its tensors' names changed by `rename`.
    fn adapter(&self, case: &str, rename: impl Fn(&str) -> String) -> PathBuf {
        let folder = self.at("adapter");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        // An expression is one for whole paths, under whichever names.
        let config = self.json["cases"][case]["adapter_config"].to_string().replace("|lm_head", "|.*lm_head");
        fs::write(folder.join("adapter_config.json"), config).unwrap();
        let tensors = self.golden.under(&format!("adapter.{case}."));
        let tensors: Vec<_> = tensors.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
        save(&folder.join("adapter_model.safetensors"), &tensors, &[]).unwrap();
        folder
    }

    /// What PEFT wrote, by name.
    fn merged(&self, case: &str) -> BTreeMap<String, Tensor> {
        let what = &self.json["cases"][case];
        let base = format!("base.{}.", what["base"].as_str().unwrap());
        let mut tensors: BTreeMap<String, Tensor> = self.golden.under(&base).into_iter().collect();
        tensors.extend(self.golden.under(&format!("merged.{case}.")));
        let names: Vec<String> = serde_json::from_value(what["names"].clone()).unwrap();
        tensors.retain(|name, _| names.contains(name));
        assert_eq!(tensors.len(), names.len());
        tensors
    }
}

/// Equal names, shapes and, but for rounding, values.
fn assert_same(folder: &Path, expected: &BTreeMap<String, Tensor>, what: &str) {
    let written = Checkpoint::open(folder).unwrap();
    let names: Vec<&str> = written.names().collect();
    assert_eq!(names, expected.keys().map(String::as_str).collect::<Vec<_>>(), "{what}");
    for (name, expected) in expected {
        let difference = (written.tensor(name).unwrap() - expected).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{what}: {name} differs by {difference}");
    }
}

#[test]
fn heads_and_embeddings_become_what_peft_writes() {
    let peft = Peft::open();
    for base in ["tied", "untied", "biased"] {
        for case in peft.cases(base) {
            let (adapter, out) = (peft.adapter(&case, str::to_owned), peft.at(&case));
            convert(&adapter, &out, None, &peft.at(base)).unwrap();
            let trained = peft.golden.under("logits.").into_iter().find(|(of, _)| *of == case);
            if let Some((_, trained)) = trained {
                // There PEFT merges into head and embedding at once, which is another model than the one that it trained.
                let weights = Weights::open(&out, Device::Cpu, Kind::Float).unwrap();
                let config = LlmConfig::open(&out).unwrap();
                let llm = CausalLm::load(&config, &weights).unwrap();
                assert!(!config.tie_word_embeddings, "{case}");
                let ids = (Tensor::arange(8, (Kind::Int64, Device::Cpu)) * 3).unsqueeze(0);
                let spans = Spans::text(&[8]);
                let plan =
                    AttentionPlan::new(&spans, VisionAttention::Bidirectional, Device::Cpu, Kind::Float).unwrap();
                let hidden = llm.decoder().forward(&llm.embed(&ids), &plan, 0).last_hidden_state;
                assert_close_to(&llm.logits(&hidden), &trained, 1e-4);
                continue;
            }
            assert_same(&out, &peft.merged(&case), &case);
            let (config, expected) = (LlmConfig::open(&out).unwrap(), &peft.json["cases"][&case]);
            assert_eq!(config.tie_word_embeddings, expected["tie_word_embeddings"], "{case}");
            assert_eq!(config.vocab_size, expected["vocab_size"], "{case}");
        }
    }
    // A base that was saved without its head, as `LlamaModel` is.
    let bare = peft.golden.under("base.tied.").into_iter();
    let bare: Vec<_> = bare.map(|(name, tensor)| (name.trim_start_matches("model.").to_owned(), tensor)).collect();
    save_folder(&peft.at("bare"), &peft.json["bases"]["tied"], &bare).unwrap();
    let case = "tied, both saved";
    convert(&peft.adapter(case, str::to_owned), &peft.at("of-bare"), None, &peft.at("bare")).unwrap();
    assert_same(&peft.at("of-bare"), &peft.merged(case), "bare");
}

type Rename = fn(&str) -> String;

/// A LLaVA's names until transformers 4.51.
fn older(name: &str) -> String {
    let pairs = [
        ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
        ("base_model.model.lm_head.", "base_model.model.language_model.lm_head."),
        ("base_model.model.model.vision_tower.", "base_model.model.vision_tower.vision_model."),
        ("base_model.model.model.", "base_model.model."),
    ];
    let found = pairs.iter().find_map(|(new, old)| Some(format!("{old}{}", name.strip_prefix(new)?)));
    found.unwrap_or_else(|| panic!("{name}"))
}

#[test]
fn adapters_of_a_llava_fit_bases_of_either_names() {
    let peft = Peft::open();
    convert(&peft.at("llava"), &peft.at("modules"), Some(Layout::LlavaTransformers5), Path::new("")).unwrap();
    // As older libraries wrote them, with a `vision_model` in the tower.
    let in_tower =
        |(name, tensor): (String, Tensor)| (name.replace("vision_tower.", "vision_tower.vision_model."), tensor);
    let deep: Vec<_> = peft.golden.under("base.llava.").into_iter().map(in_tower).collect();
    save_folder(&peft.at("deep"), &peft.json["bases"]["llava"], &deep).unwrap();
    let names: [(&str, Rename); 2] = [("new", str::to_owned), ("old", older)];
    let cases = peft.cases("llava");
    assert_eq!(cases.len(), 5);
    for (case, (which, rename)) in cases.iter().flat_map(|case| names.map(|name| (case, name))) {
        let expected = peft.merged(case);
        for (base, layout) in
            [("llava", Layout::Llava), ("modules", Layout::LlavaTransformers5), ("deep", Layout::Llava)]
        {
            let what = format!("{case}, {which} names, {base}");
            let out = peft.at("out");
            let _ = fs::remove_dir_all(&out);
            let report = convert(&peft.adapter(case, rename), &out, None, &peft.at(base)).unwrap();
            assert_eq!((report.from, report.to), (Layout::PeftLlava, layout), "{what}");
            let published = match base {
                "modules" => {
                    let published = peft.at("published");
                    let _ = fs::remove_dir_all(&published);
                    convert(&out, &published, Some(Layout::Llava), Path::new("")).unwrap();
                    published
                }
                _ => out.clone(),
            };
            let copies = expected.iter().map(|(name, tensor)| (name.clone(), tensor.copy()));
            let expected = if base == "deep" { copies.map(in_tower).collect() } else { copies.collect() };
            assert_same(&published, &expected, &what);
            Llava::open(&out, Device::Cpu, Kind::Float).unwrap();
        }
    }
    let stray = peft.adapter("llava, names", |name| name.replace("layers.1", "layers.7"));
    let error = format!("{:#}", convert(&stray, &peft.at("x"), None, &peft.at("llava")).unwrap_err());
    assert!(error.contains("adapters that fit no weight"), "{error}");
}

#[test]
fn a_llavas_larger_vocabulary_is_told_in_its_text_config() {
    let peft = Peft::open();
    let adapter = peft.adapter("llava, projector saved", str::to_owned);
    let file = adapter.join("adapter_model.safetensors");
    let read = Checkpoint::open(&file).unwrap();
    let mut tensors: Vec<_> = read.names().map(|name| (name.to_owned(), read.tensor(name).unwrap().copy())).collect();
    drop(read);
    let random = fixtures::Random::new(3);
    for name in ["base_model.model.model.language_model.embed_tokens.weight", "base_model.model.lm_head.weight"] {
        tensors.push((name.to_owned(), random.normal([34, 16])));
    }
    save(&file, &tensors, &[]).unwrap();
    convert(&adapter, &peft.at("out"), None, &peft.at("llava")).unwrap();
    let llm = LlavaConfig::open(&peft.at("out")).unwrap().llm;
    assert_eq!((llm.vocab_size, llm.tie_word_embeddings), (34, false));
}

#[test]
fn a_sum_is_not_rounded_to_the_dtype_of_the_adapters_copy() {
    let peft = Peft::open();
    for case in ["untied, head adapted", "untied, embedding adapted"] {
        let adapter = peft.adapter(case, str::to_owned);
        let file = adapter.join("adapter_model.safetensors");
        let read = Checkpoint::open(&file).unwrap();
        let half = |name: &str| (name.to_owned(), read.tensor(name).unwrap().to_kind(Kind::BFloat16));
        let tensors: Vec<_> = read.names().map(half).collect();
        drop(read);
        save(&file, &tensors, &[]).unwrap();
        let out = peft.at("out");
        let _ = fs::remove_dir_all(&out);
        convert(&adapter, &out, None, &peft.at("untied")).unwrap();
        let written = Checkpoint::open(&out).unwrap();
        let name = if case.contains("head") { "lm_head.weight" } else { "model.embed_tokens.weight" };
        // The base is in f32, and so is what PEFT adds to it.
        let weight = written.tensor(name).unwrap();
        assert_eq!(weight.kind(), Kind::Float, "{case}");
        assert_close_to(&weight, &peft.merged(case)[name], 0.02);
        let rounded = weight.to_kind(Kind::BFloat16).to_kind(Kind::Float);
        assert!(!weight.equal(&rounded), "{case}");
    }
}

#[test]
fn biases_that_fit_nothing_are_told() {
    let peft = Peft::open();
    let adapter = peft.adapter("biased, all", |name| name.replace("k_proj.bias", "o_proj.bias"));
    let error = format!("{:#}", convert(&adapter, &peft.at("x"), None, &peft.at("biased")).unwrap_err());
    assert!(error.contains("fit nothing in its base") && error.contains("o_proj.bias"), "{error}");
    let adapter =
        peft.adapter("untied, embedding adapted", |name| name.replace("lora_embedding_B", "lora_embedding_X"));
    let error = format!("{:#}", convert(&adapter, &peft.at("x"), None, &peft.at("untied")).unwrap_err());
    assert!(error.contains("lora_embedding_X` is no part of a LoRA or DoRA"), "{error}");
}

#[test]
fn an_adapters_own_tokenizer_and_template_go_before_its_bases() {
    let peft = Peft::open();
    let base = peft.at("tied");
    let write = |folder: &Path, file: &str, text: &str| fs::write(folder.join(file), text).unwrap();
    for (file, text) in [
        ("tokenizer.json", "base"),
        ("special_tokens_map.json", "base"),
        ("tokenizer_config.json", r#"{"chat_template": "of the base"}"#),
        ("generation_config.json", "base"),
        ("README.md", "base"),
    ] {
        write(&base, file, text);
    }
    let case = "tied, head saved";
    let run = |own: &[(&str, &str)]| {
        let (adapter, out) = (peft.adapter(case, str::to_owned), peft.at("out"));
        let _ = fs::remove_dir_all(&out);
        for (file, text) in own {
            write(&adapter, file, text);
        }
        convert(&adapter, &out, None, &base).unwrap();
        [
            "tokenizer.json",
            "special_tokens_map.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        ]
        .map(|file| fs::read_to_string(out.join(file)).unwrap_or_default())
    };
    let config = r#"{"chat_template": "of the base"}"#;
    assert_eq!(run(&[]), ["base", "base", config, "", "base"]);
    // A tokenizer is one thing: no file of another's is mixed into it; the template goes on where it has none.
    assert_eq!(
        run(&[("tokenizer.json", "own"), ("tokenizer_config.json", "{}")]),
        ["own", "", "{}", "of the base", "base"]
    );
    assert_eq!(run(&[("chat_template.jinja", "own")]), ["base", "base", config, "own", "base"]);
    let own = r#"{"chat_template": "own"}"#;
    write(&base, "chat_template.jinja", "of the base");
    assert_eq!(run(&[("tokenizer.json", "own"), ("tokenizer_config.json", own)]), ["own", "", own, "", "base"]);
    assert_eq!(run(&[("generation_config.json", "own")])[4], "base");
}

#[test]
fn what_does_not_open_is_not_kept() {
    let peft = Peft::open();
    let mut tensors = peft.golden.under("base.untied.");
    tensors.retain(|(name, _)| name != "model.norm.weight");
    save_folder(&peft.at("broken"), &peft.json["bases"]["untied"], &tensors).unwrap();
    let error = format!("{:#}", convert(&peft.at("broken"), &peft.at("out"), None, Path::new("")).unwrap_err());
    assert!(error.contains("broken does not open, and is not kept"), "{error}");
    assert!(error.contains("missing    model.norm.weight") && !peft.at("out").exists(), "{error}");
    let mut config = peft.json["bases"]["untied"].clone();
    config["vocab_size"] = json!(31);
    save_folder(&peft.at("broken"), &config, &peft.golden.under("base.untied.")).unwrap();
    let error = format!("{:#}", convert(&peft.at("broken"), &peft.at("out"), None, Path::new("")).unwrap_err());
    assert!(error.contains("model.embed_tokens.weight is [32, 16], the model expects [31, 16]"), "{error}");
}
