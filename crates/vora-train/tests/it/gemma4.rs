//! A Gemma 4 Unified in the trainer, by a program of its own: pictures of any shape, answers alone, PEFT's adapters.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use serde_json::{Value, json};
use tch::{Device, Kind};
use vora_data::SampleMaker;
use vora_image::{ImageProcessor, RgbImage};
use vora_lora::{AdapterFolder, LoraConfig};
use vora_model::{Gemma4Unified, Weights};
use vora_recipe::TrainConfig;
use vora_student::{Pictures, Student, StudentParts};
use vora_train::data::Sources;
use vora_train::{Options, Outcome, Plan, Silent, Trainer};

use crate::taught::{self, asked, resolve};

const FOLDER: &str = "fixtures/tiny/gemma4";
const STEPS: u64 = 60;

fn picture(index: usize) -> RgbImage {
    let [width, height] = [[60, 20], [20, 60], [40, 40], [9, 90]][index];
    RgbImage::from_fn(width, height, |x, y| [(x * 4) as u8, (y * 4) as u8, 60 * index as u8].into())
}

/// Four pictures of four shapes, with a word for each.
fn config(folder: &Path, steps: u64) -> TrainConfig {
    let record = |(index, answer): (usize, &str)| {
        picture(index).save(folder.join(format!("{index}.png"))).unwrap();
        format!(
            r#"{{"frames": ["{index}.png"], "conversations": [{{"from": "human", "value": "<image>\nWhat shape?"}},
                {{"from": "gpt", "value": "{answer}"}}]}}"#
        )
        .replace('\n', " ")
    };
    let records: Vec<String> = ["wide", "tall", "square", "a line"].into_iter().enumerate().map(record).collect();
    std::fs::write(folder.join("records.jsonl"), records.join("\n")).unwrap();
    let folder = folder.display();
    TrainConfig::parse(
        &format!(
            "output_dir: {folder}/run\nmax_steps: {steps}\nlearning_rate: 0.02\nbf16: false\nsave_steps: 999\n\
             per_device_train_batch_size: 4\nmodel: {{type: own, llm: {FOLDER}, image_size: 16}}\n\
             data: {{train: {{data_fetch: {{data_paths: [{{anno_path: '{folder}/records.jsonl', image_folder: '{folder}'}}]}}}}}}\n"
        ),
        &[],
    )
    .unwrap()
}

fn trainer(config: TrainConfig, trains_embedder: bool, resume: bool) -> Trainer {
    let folder = resolve(FOLDER).unwrap();
    let new = Weights::random(config.seed, Device::Cpu, Kind::Float);
    let lora = LoraConfig {
        target_modules: vec!["q_proj".into(), "k_proj".into(), "o_proj".into(), "down_proj".into()],
        ..LoraConfig::new(8, 3)
    };
    let model = Gemma4Unified::open_to_teach(&folder, FOLDER, Some(&lora), trains_embedder, &new).unwrap();
    let token_size = model.vision_embedder().config().token_size();
    let pictures = Pictures::new(ImageProcessor::open(&folder).unwrap(), token_size);
    let parts = StudentParts { model: Box::new(model), trained: new, llm: None, llm_folder: folder, pictures };
    let student = Student::from_parts(parts, &config).unwrap();
    let maker = Arc::new(SampleMaker::new(student.preparation(&config).unwrap()));
    let sources = Sources::open(&config, &maker).unwrap();
    let mut options = Options::new(Device::Cpu, &resolve);
    options.resume = resume;
    Trainer::from_parts(config, options, student, sources).unwrap()
}

#[test]
fn it_learns_goes_on_bit_for_bit_and_what_it_leaves_opens() {
    for trains_embedder in [true, false] {
        let [whole, parts] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        let mut uninterrupted = trainer(config(whole.path(), STEPS), trains_embedder, false);
        let first = uninterrupted.train_step().unwrap();
        let Outcome::Finished(_) = uninterrupted.train(&mut Silent).unwrap() else { panic!("nobody stopped it") };
        let mut half = trainer(config(parts.path(), STEPS), trains_embedder, false);
        let again = half.train_step().unwrap();
        assert_eq!(first.loss, again.loss);
        half.save(&mut Silent).unwrap();
        drop(half);
        let mut half = trainer(config(parts.path(), STEPS), trains_embedder, true);
        let mut last = again.loss;
        while half.step() < STEPS {
            last = half.train_step().unwrap().loss;
        }
        assert!(last < 0.5 * first.loss, "{} -> {last}", first.loss);
        let trained = uninterrupted.parameters();
        assert_eq!(trained.iter().any(|(name, _)| name.starts_with("model.vision_embedder.")), trains_embedder);
        for ((name, a), (_, b)) in trained.iter().zip(&half.parameters()) {
            assert!(a.equal(b), "{name}");
        }

        let left = whole.path().join("run/final");
        assert_eq!(left.join("vision.safetensors").exists(), trains_embedder);
        let adapter = AdapterFolder::open(&left).unwrap();
        assert_eq!((adapter.config().r, adapter.base_model()), (8, Some(FOLDER)));
        let mut model = vora_model::open(&left, Device::Cpu, Kind::Float, &resolve).unwrap();
        let logits = asked(&*model, &left, &picture(3));
        let base = vora_model::open(&resolve(FOLDER).unwrap(), Device::Cpu, Kind::Float, &resolve).unwrap();
        let before = asked(&*base, &left, &picture(3));
        assert!((&logits - before).abs().max().double_value(&[]) > 0.1);
        model.merge().unwrap();
        fixtures::assert_close_to(&asked(&*model, &left, &picture(3)), &logits, 1e-4);
        drop(half);
    }
}

/// The recipe for tests, in `folder`.
fn recipe(folder: &Path, more: &[&str]) -> Result<TrainConfig> {
    taught::recipe("gemma4-smoke.yaml", folder, more)
}

#[test]
fn a_run_file_teaches_it_and_goes_on_bit_for_bit() {
    let run = |folder: &Path, more: &[&str], stops| taught::parameters("gemma4-smoke.yaml", folder, more, stops);
    for more in [
        &[][..],
        &["model.train=[]", "learning_rates={}", "model.load_in_8bit=true"],
        &["model.aux_vision=", "distill={}"],
    ] {
        let [whole, parts] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        let (uninterrupted, resumed) = (run(whole.path(), more, false), run(parts.path(), more, true));
        let has = |part: &str| uninterrupted.iter().any(|(name, _)| name.starts_with(part));
        assert!(has("language_model.model.layers.1.mlp.up_proj.lora_A") && !has("language_model.model.layers.2"));
        let is = |word: &str| !more.iter().any(|set| set.contains(word));
        assert_eq!((has("model.vision_embedder."), has("aux_vision.")), (is("train=[]"), is("aux_vision=")));
        assert_eq!(uninterrupted.len(), resumed.len());
        for ((name, a), (_, b)) in uninterrupted.iter().zip(&resumed) {
            assert!(a.equal(b), "{more:?}: {name}");
        }

        let left = whole.path().join("run/final");
        let mut model = vora_model::open(&left, Device::Cpu, Kind::Float, &resolve).unwrap();
        let logits = asked(&*model, &left, &picture(1));
        model.merge().unwrap();
        let merged = whole.path().join("merged");
        model.save(&merged).unwrap();
        vora_model::beside::copy_beside(&left, &merged).unwrap();
        let merged_model = vora_model::open(&merged, Device::Cpu, Kind::Float, &resolve).unwrap();
        fixtures::assert_close_to(&asked(&*merged_model, &merged, &picture(1)), &logits, 1e-4);
    }
}

#[test]
fn a_run_file_that_does_not_fit_the_folder_is_told_by_key() {
    let folder = tempfile::tempdir().unwrap();
    let error = |more: &[&str]| {
        let config = recipe(folder.path(), more).unwrap();
        format!("{:#}", Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap_err())
    };
    let found = error(&["model.llm=fixtures/tiny/llm"]);
    assert!(found.contains("model.llm") && found.contains("a Gemma 4 Unified folder says"), "{found}");
    let found = error(&["model.max_image_tokens=100"]);
    assert!(found.contains("max_image_tokens is 100, Gemma 4's processor takes 70, 140, 280, 560, 1120"), "{found}");
    let found = error(&["model.lora.layers=9"]);
    assert!(found.contains('9') && found.contains("layers"), "{found}");
    let found = error(&["model.image_size=6"]);
    assert!(found.contains("model.image_size: a picture of 6 x 6 pixels does not divide"), "{found}");
    let config = recipe(folder.path(), &["model.max_image_tokens=140"]).unwrap();
    let student = Student::new(&config, Device::Cpu, Kind::Float, &resolve).unwrap();
    let (rows, columns) = (11, 11); // of 4 x 4 pixels, within 140
    assert_eq!(student.image_size(), 44);
    assert_eq!(student.model.image_grid(44, 44).unwrap(), (rows, columns));
}

/// A folder with the config of a Gemma 4 Unified, the tiny one's tokenizer, and no weights.
fn without_weights(change: impl Fn(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(resolve(FOLDER).unwrap()).unwrap().map(|entry| entry.unwrap().path()) {
        if file.extension().is_some_and(|extension| extension != "safetensors") {
            std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    folder
}

#[test]
fn a_plan_counts_what_a_config_foretells() {
    let run = tempfile::tempdir().unwrap();
    let plan = |llm: &str, more: &[&str]| {
        let llm = format!("model.llm={llm}");
        let more = [more, &[&llm]].concat();
        Plan::measure(&recipe(run.path(), &more).unwrap(), Options::new(Device::Cpu, &resolve)).unwrap()
    };
    let folder = without_weights(|_| {});
    let (with, without) = (plan(FOLDER, &[]), plan(folder.path().to_str().unwrap(), &[]));
    assert_eq!((&with.size.parameters, &with.size.batch), (&without.size.parameters, &without.size.batch));
    assert_eq!(with.size.memory.weights, without.size.memory.weights);
    assert!(with.measured.is_some() && without.measured.is_none());
    assert!(
        without.to_string().contains("not measured: the folder of model.llm, or of the encoder, has no weights"),
        "{without}"
    );
    let error = |more: &[&str]| {
        let llm = format!("model.llm={}", folder.path().display());
        let config = recipe(run.path(), &[more, &[&llm]].concat()).unwrap();
        let found = Student::new(&config, Device::Cpu, Kind::Float, &resolve).map(drop).unwrap_err();
        let counted = Student::outline(&config, Device::Cpu, Kind::Float, &resolve).map(drop);
        (format!("{found:#}"), counted.map_err(|error| format!("{error:#}")))
    };
    assert!(error(&[]).0.contains("safetensors") && error(&[]).1.is_ok());
    assert!(error(&["model.load_in_4bit=true"]).1.unwrap_err().contains("few bits are counted from weights"));
}

/// The sizes of google/gemma-4-12B-it, which has 11,959,730,176 parameters, 640 x 3840 of them in the part that hears; a scalar
/// for each layer, which HF keeps as a buffer, is counted here too.
#[test]
fn the_published_12b_is_counted_to_the_last_parameter() {
    let folder = without_weights(|config| {
        let layer = |idx: i64| if idx % 6 == 5 { "full_attention" } else { "sliding_attention" };
        let types: Vec<&str> = (0..48).map(layer).collect();
        config["text_config"] = json!({
            "model_type": "gemma4_unified_text", "vocab_size": 262_144, "hidden_size": 3840, "intermediate_size": 15_360,
            "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
            "global_head_dim": 512, "num_global_key_value_heads": 1, "attention_k_eq_v": true, "layer_types": types,
            "sliding_window": 1024, "max_position_embeddings": 262_144, "final_logit_softcapping": 30.0,
            "tie_word_embeddings": true, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        });
        config["vision_config"] = json!({"model_type": "gemma4_unified_vision"});
    });
    let processor = folder.path().join("processor_config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&processor).unwrap()).unwrap();
    (json["image_processor"]["patch_size"], json["image_processor"]["pooling_kernel_size"]) = (json!(16), json!(3));
    std::fs::write(&processor, json.to_string()).unwrap();
    let run = tempfile::tempdir().unwrap();
    let llm = format!("model.llm={}", folder.path().display());
    let lora = "model.lora={r: 1, target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]}";
    let more = [&llm, lora, "model.train=[]", "learning_rates={}", "model.aux_vision=", "distill={}"];
    let plan = Plan::measure(&recipe(run.path(), &more).unwrap(), Options::new(Device::Cpu, &resolve)).unwrap();
    assert_eq!(plan.size.parameters.frozen, 11_959_730_176 - 640 * 3840 + 48);
    // The layers whose keys are values have no v_proj to adapt.
    let linears = |module: &str| plan.size.adapters.iter().find(|adapted| adapted.module == module).unwrap().linears;
    assert_eq!((linears("self_attn.q_proj"), linears("self_attn.v_proj")), (48, 40));
    assert!(plan.measured.is_none());
}

/// The teacher's features of what it is shown, other pixels than the student's, are kept as they were.
#[test]
fn kept_features_of_its_teacher_teach_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = resolve("fixtures/tiny/data").unwrap().display().to_string();
    let fetch =
        format!("data_fetch: {{data_paths: [{{anno_path: {tiny}/conversations.jsonl, image_folder: {tiny}/images}}]}}");
    let data = format!("data={{train: {{{fetch}}}, eval: {{test: {{{fetch}, samples: 1}}}}}}");
    let run = |more: &[&str]| {
        taught::parameters("gemma4-smoke.yaml", folder.path(), &[&[data.as_str()], more].concat(), false)
    };
    let cache = format!("distill.cache={}", folder.path().join("cache").display());
    let runs = [run(&[]), run(&[&cache]), run(&[&cache])];
    assert!(folder.path().join("cache").exists());
    for kept in &runs[1..] {
        assert!(kept.iter().zip(&runs[0]).all(|((_, a), (_, b))| a.equal(b)));
    }
}
