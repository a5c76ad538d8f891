//! Adapters by name: every request as from the model with that adapter alone.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use fixtures::Random;
use tch::{Device, Kind};
use vora_llm::LlmConfig;
use vora_lora::{ActsOn, AdapterFolder, BaseModel, LoraConfig, save_adapter};
use vora_model::trained::{Parts, VISION};
use vora_model::{VisionLanguageModel, Vora, VoraConfig};
use vora_torch::checkpoint::save;
use vora_torch::weights::Weights;

use super::*;
use crate::{Assistant, InferError, Request, RgbImage, Width};

fn tiny(name: &str) -> PathBuf {
    fixtures::root().join("tiny").join(name)
}

/// The folder that a config names.
fn resolve(name: &str) -> Result<PathBuf> {
    Ok(PathBuf::from(name))
}

fn open(folder: &Path, kind: Kind) -> Assistant {
    Assistant::open(folder, Device::Cpu, kind, &resolve).unwrap()
}

fn shake(adapters: &Weights, seed: u64) {
    let random = Random::new(seed);
    for (_, tensor) in adapters.parameters().iter().filter(|(name, _)| name.contains("lora_B")) {
        tch::no_grad(|| tensor.shallow_clone().copy_(&(random.normal(tensor.size()) * 0.2)));
    }
}

/// PEFT's folder of an adapter over the model in `base`, whose B is not zero.
fn adapter(folder: PathBuf, base: &Path, lora: &LoraConfig, seed: u64) -> PathBuf {
    let (mut model, new) = (open(base, Kind::Float).model, Weights::random(seed, Device::Cpu, Kind::Float));
    model.attach("new", lora, &new).unwrap();
    shake(&new, seed);
    let tensors = model.adapted().adapter_tensors().unwrap();
    save_adapter(&folder, lora, BaseModel::causal_lm("tiny"), &tensors).unwrap();
    folder
}

/// Two that differ in rank, scaling, layers and modules.
fn cats_and_dogs(root: &Path, base: &Path) -> [PathBuf; 2] {
    let cats = LoraConfig { lora_alpha: Some(6.0), ..LoraConfig::of_modules(3, ["q_proj", "down_proj"]) };
    let dogs = LoraConfig {
        lora_alpha: Some(4.0),
        use_rslora: true,
        rank_pattern: BTreeMap::from([("mlp.up_proj".to_owned(), 50)]),
        ..LoraConfig::new(5, 2)
    };
    [adapter(root.join("cats"), base, &cats, 1), adapter(root.join("dogs"), base, &dogs, 2)]
}

/// What a run leaves of a VoRA over the tiny LLM.
fn run(folder: PathBuf, acts_on: ActsOn, seed: u64) -> PathBuf {
    fs::create_dir_all(&folder).unwrap();
    let (llm, new) = (tiny("llm"), Weights::random(seed, Device::Cpu, Kind::Float));
    let mut config = VoraConfig::new(LlmConfig::open(&llm).unwrap(), 24, 4, 16);
    config.lora = Some(LoraConfig { acts_on, ..LoraConfig::new(4, 3) });
    config.llm_name = llm.display().to_string();
    let weights = Weights::open(&llm, Device::Cpu, Kind::Float).unwrap();
    let model = Vora::assemble(config, &weights, &new).unwrap();
    shake(&new, seed);
    let parts = Parts::of(new.parameters(), &model);
    save_adapter(&folder, model.lora().unwrap(), BaseModel::causal_lm("tiny"), &parts.adapter).unwrap();
    save(&folder.join(VISION), &parts.vision, &[]).unwrap();
    fs::write(folder.join("config.json"), model.config_json().unwrap().to_string()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        fs::copy(llm.join(name), folder.join(name)).unwrap();
    }
    let processor = serde_json::json!({
        "image_processor_type": "LlavaImageProcessor", "do_resize": true, "size": {"height": 16, "width": 16},
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5], "resample": 2, "do_convert_rgb": true, "do_pad": false, "do_center_crop": false,
    });
    fs::write(folder.join("preprocessor_config.json"), processor.to_string()).unwrap();
    folder
}

fn ask(pictures: usize, text: &str) -> Request<'static> {
    let picture =
        |seed: usize| RgbImage::from_fn(16, 16, |x, y| [(x * 16) as u8, (y * 16) as u8, 90 * seed as u8].into());
    let pictures: Vec<RgbImage> = (0..pictures).map(picture).collect();
    Request::question(pictures, text).with_max_new_tokens(12).with_logprobs(2)
}

/// Every token of an answer with its log-probability and those of the likeliest, bit by bit.
fn bits(events: impl Iterator<Item = Event>) -> Vec<(i64, u32, u32)> {
    let mut all = Vec::new();
    for event in events {
        match event {
            Event::Text { tokens, .. } => {
                all.extend(tokens.iter().map(|t| (t.id, t.logprob.to_bits(), t.top[1].2.to_bits())));
            }
            Event::Failed(error) => panic!("{error:#}"),
            _ => {}
        }
    }
    assert!(!all.is_empty());
    all
}

fn engine(assistant: Assistant, width: Option<Width>) -> Engine {
    let config = EngineConfig { prefill_chunk: 7, cache_bytes: 1 << 21, width, ..EngineConfig::default() };
    Engine::start(assistant, config).unwrap()
}

/// In all widths, over one copy of the weights, with the same words by all of them: what one computed is not another's.
#[test]
fn a_mixed_batch_is_as_each_alone() {
    let root = tempfile::tempdir().unwrap();
    let [cats, dogs] = cats_and_dogs(root.path(), &tiny("llm"));
    for (kind, width) in [
        (Kind::Float, None),
        (Kind::BFloat16, None),
        (Kind::Float, Some(Width::Int8)),
        (Kind::BFloat16, Some(Width::Int4)),
    ] {
        let alone = |folder: Option<&Path>, text: &str| {
            let mut assistant = open(&tiny("llm"), kind);
            if let Some(folder) = folder {
                let adapter = AdapterFolder::open(folder).unwrap();
                let llm = assistant.model.llm_mut();
                adapter.attach("own", Device::Cpu, |visit| llm.linears_mut(visit)).unwrap();
            }
            bits(engine(assistant, width).stream(ask(0, text)).unwrap())
        };
        let mut assistant = open(&tiny("llm"), kind);
        assistant.add_adapter("cats", &cats, &resolve).unwrap();
        assistant.add_adapter("dogs", &dogs, &resolve).unwrap();
        let engine = engine(assistant, width);
        let words = ["Is it red, or is it blue? And where does it stand?", "Why?"];
        let mut expected = Vec::new();
        for text in words {
            expected.extend([alone(Some(&cats), text), alone(Some(&dogs), text), alone(None, text)]);
        }
        assert!(expected[0] != expected[1] && expected[0] != expected[2] && expected[1] != expected[2]);
        for round in 0..2 {
            let requests = words
                .iter()
                .flat_map(|text| [ask(0, text).with_adapter("cats"), ask(0, text).with_adapter("dogs"), ask(0, text)]);
            let streams: Vec<_> = requests.map(|request| engine.stream(request).unwrap()).collect();
            for (i, (stream, expected)) in streams.into_iter().zip(&expected).enumerate() {
                assert_eq!(&bits(stream), expected, "{kind:?} {width:?}, request {i}, round {round}");
            }
        }
        assert!(engine.stats().cached_tokens > 0);
    }
}

/// By libtorch's operators, on a model that our own kernels do not serve.
#[test]
fn so_it_is_where_the_kernels_do_not_serve() {
    let root = tempfile::tempdir().unwrap();
    let [cats, dogs] = cats_and_dogs(root.path(), &tiny("gemma4"));
    let tokens = |events| bits(events).into_iter().map(|(id, ..)| id).collect::<Vec<_>>();
    let alone = |folder: Option<&Path>| {
        let mut assistant = open(&tiny("gemma4"), Kind::Float);
        if let Some(folder) = folder {
            let adapter = AdapterFolder::open(folder).unwrap();
            let llm = assistant.model.llm_mut();
            adapter.attach("own", Device::Cpu, |visit| llm.linears_mut(visit)).unwrap();
        }
        tokens(
            Box::new(engine(assistant, None).stream(ask(1, "What is it?")).unwrap()) as Box<dyn Iterator<Item = Event>>
        )
    };
    let expected = [alone(Some(&cats)), alone(Some(&dogs)), alone(None)];
    assert!(expected[0] != expected[2] && expected[1] != expected[2], "{expected:?}");
    let mut assistant = open(&tiny("gemma4"), Kind::Float);
    assistant.add_adapter("cats", &cats, &resolve).unwrap();
    assistant.add_adapter("dogs", &dogs, &resolve).unwrap();
    let engine = engine(assistant, None);
    let request = || ask(1, "What is it?");
    let requests = [request().with_adapter("cats"), request().with_adapter("dogs"), request().without_adapters()];
    let streams: Vec<_> = requests.into_iter().map(|request| engine.stream(request).unwrap()).collect();
    let found: Vec<_> =
        streams.into_iter().map(|stream| tokens(Box::new(stream) as Box<dyn Iterator<Item = Event>>)).collect();
    assert_eq!(found, expected);
}

/// Several VoRAs over one LLM, each with its own eyes, beside an adapter for words.
#[test]
fn each_vora_sees_with_its_own_eyes() {
    let root = tempfile::tempdir().unwrap();
    let red = run(root.path().join("red"), ActsOn::All, 3);
    let blue = run(root.path().join("blue"), ActsOn::ImageTokens, 4);
    let [cats, _] = cats_and_dogs(root.path(), &tiny("llm"));
    let mut assistant = open(&tiny("llm"), Kind::Float);
    for (name, folder) in [("red", &red), ("blue", &blue), ("cats", &cats)] {
        assistant.add_adapter(name, folder, &resolve).unwrap();
    }
    assert_eq!(assistant.adapters().collect::<Vec<_>>(), [("red", true), ("blue", true), ("cats", false)]);
    let served = engine(assistant, None);
    let [red, blue] = [red, blue].map(|folder| engine(open(&folder, Kind::Float), None));
    for round in 0..2 {
        let asked = |pictures| ask(pictures, "What is it?");
        let cases = [(&red, "red", 1), (&blue, "blue", 1), (&red, "red", 2), (&blue, "blue", 2), (&red, "red", 0)];
        let streams = cases.map(|(_, name, pictures)| served.stream(asked(pictures).with_adapter(name)).unwrap());
        let expected = cases.map(|(alone, _, pictures)| bits(alone.stream(asked(pictures)).unwrap()));
        assert!(expected[0] != expected[1]);
        for (stream, (expected, (_, name, pictures))) in streams.into_iter().zip(expected.into_iter().zip(cases)) {
            assert_eq!(bits(stream), expected, "{name} with {pictures} pictures, round {round}");
        }
    }
    for request in [ask(1, "What?"), ask(1, "What?").with_adapter("cats")] {
        let error = served.stream(request).err().unwrap();
        assert_eq!(error.downcast_ref(), Some(&InferError::SeesNoPictures));
    }
}

#[test]
fn what_cannot_be_served_is_told_by_name() {
    let root = tempfile::tempdir().unwrap();
    let [cats, _] = cats_and_dogs(root.path(), &tiny("llm"));
    let mut assistant = open(&tiny("llm"), Kind::Float);
    let mut told = |name: &str, folder: &Path| {
        let error = format!("{:#}", assistant.add_adapter(name, folder, &resolve).unwrap_err());
        assert!(error.contains(&format!("`{name}`")), "{error}");
        error
    };
    let golden = |name: &str| fixtures::root().join("golden").join(name);
    for (folder, says) in [
        (golden("peft_folders/dora"), "is a DoRA (`use_dora`)"),
        (golden("lora_peft"), "weights of the model's own (`modules_to_save`), as `model.norm."),
        (golden("peft_folders/plain"), "attaching the adapter"), // of a model of other sizes
        (tiny("llm"), "has no adapters apart from its weights"),
        (root.path().join("nowhere"), "nowhere"),
    ] {
        let error = told("birds", &folder);
        assert!(error.contains(says), "{error}");
    }
    let other = root.path().join("other");
    fs::create_dir(&other).unwrap();
    for entry in fs::read_dir(tiny("llm")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, other.join(path.file_name().unwrap())).unwrap();
    }
    let mut tensors = assistant.model.llm().tensors();
    tensors[0].1 = &tensors[0].1 * 1.01;
    save(&other.join("model.safetensors"), &tensors, &[]).unwrap();
    let error = open(&other, Kind::Float)
        .add_adapter("red", &run(root.path().join("red"), ActsOn::All, 3), &resolve)
        .unwrap_err();
    assert!(format!("{error:#}").contains("trained over another LLM"), "{error:#}");

    assistant.add_adapter("cats", &cats, &resolve).unwrap(); // what was refused left nothing behind
    let error = assistant.add_adapter("cats", &cats, &resolve).unwrap_err().to_string();
    assert_eq!(error, "there is an adapter `cats` already");
    let lone = assistant.reply(&ask(0, "Why?").with_adapter("cats"), |_| true).unwrap_err().to_string();
    assert!(lone.contains("Engine"), "{lone}");
    let engine = engine(assistant, None);
    let error = engine.stream(ask(0, "Why?").with_adapter("birds")).err().unwrap();
    let expected = InferError::UnknownAdapter { name: "birds".to_owned(), known: vec!["cats".to_owned()] };
    assert_eq!(error.downcast_ref(), Some(&expected));
    assert_eq!(error.to_string(), "there is no adapter `birds`, only cats");
}
