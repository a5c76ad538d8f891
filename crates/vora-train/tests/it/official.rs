//! Folders of the official VoRA code, made by it (`fixtures/generate/official.py`): opened, merged, converted, trained on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use vora_llm::{DropoutSeed, VisionAttention};
use vora_lora::LoraConfig;
use vora_model::convert::{Conversion, Layout, Options};
use vora_model::{Input, VisionLanguageModel, Vora};
use vora_recipe::TrainConfig;
use vora_student::{DeviceBatch, Losses, Student};
use vora_text::{Span, Spans};
use vora_torch::checkpoint::{Checkpoint, save};
use vora_train::run::snapshot::Snapshot;
use vora_train::step::optim::optimizer;
use vora_vision::PositionTable;

const CASES: [&str; 4] = ["unmerged", "merged", "tied", "llama"];

/// Tokens of the two rows, pictures among them; the second picture of the second row stands right beside the first.
const WORDS: [i64; 2] = [12, 13];

fn folder(case: &str) -> PathBuf {
    fixtures::root().join("golden/official").join(case)
}

fn open(folder: &Path) -> Vora {
    Vora::open(folder, Device::Cpu, Kind::Float).unwrap()
}

/// The batch of the script, without the padding that its rows end with.
fn input(golden: &fixtures::Golden) -> Input {
    let rows = [vec![Span::text(3), Span::image(2, 2), Span::text(5)], {
        vec![Span::text(2), Span::image(2, 2), Span::image(2, 2), Span::text(3)]
    }];
    let ids: [[i64; 13]; 2] =
        [[5, 6, 7, 0, 0, 0, 0, 8, 9, 10, 11, 12, 2], [13, 14, 0, 0, 0, 0, 0, 0, 0, 0, 15, 16, 17]];
    Input::new(Tensor::from_slice2(&ids), golden["pixel_values"].unbind(0), Spans::new(rows.into()))
}

/// `[12 + 13, vocab]`: the logits of both rows.
fn logits(model: &dyn VisionLanguageModel, golden: &fixtures::Golden) -> Tensor {
    let output = tch::no_grad(|| model.forward(&input(golden), 0)).unwrap();
    let logits = model.llm().logits(&output.last_hidden_state).detach();
    rows(&logits)
}

fn rows(logits: &Tensor) -> Tensor {
    Tensor::cat(&[0, 1].map(|row| logits.get(row).narrow(0, 0, WORDS[row as usize])), 0)
}

/// The same of the official code.
fn says_the_same(model: &dyn VisionLanguageModel, golden: &fixtures::Golden, case: &str) {
    let whole = &golden[&format!("{case}.logits")];
    for (row, from, len) in [(0, 0, WORDS[0]), (1, WORDS[0], WORDS[1])] {
        let expected = whole.get(row).narrow(0, 0, len);
        fixtures::assert_close_to(&logits(model, golden).narrow(0, from, len), &expected, 1e-4);
    }
}

/// Biases of layers with adapters, which no Qwen2 and no Llama has.
fn biases(model: &dyn VisionLanguageModel) -> Vec<(String, Tensor)> {
    let mut tensors = model.tensors().unwrap();
    let of_layer = |name: &str| name.ends_with("_proj.bias") && !name.contains(".q_") && !name.contains(".k_");
    tensors.retain(|(name, _)| of_layer(name) && !name.contains(".v_"));
    tensors
}

fn config_of(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

#[test]
fn official_folders_say_here_what_they_say_there() {
    let golden = fixtures::open("official");
    for case in CASES {
        let model = open(&folder(case));
        says_the_same(&model, &golden, case);
        assert_eq!(model.config().pos_embed, PositionTable::FirstRows);
    }
    let config = |case: &str| open(&folder(case)).config().clone();
    assert_eq!(config("unmerged").lora.unwrap().r, 3);
    assert_eq!(config("merged").lora, None); // `"r": -1`
    assert_eq!(config("tied").lora.unwrap().layers, 3); // `"layers": "all"`
    assert!(config("tied").llm.tie_word_embeddings);
    assert_eq!(config("llama").llm.model_type, "llama");
    assert_eq!(biases(&open(&folder("unmerged"))).len(), 2 * 4);
}

#[test]
fn a_merged_official_folder_keeps_its_biases_and_names_no_code() {
    let golden = fixtures::open("official");
    let root = tempfile::tempdir().unwrap();
    let mut model = open(&folder("unmerged"));
    model.merge().unwrap();
    says_the_same(&model, &golden, "merged");
    model.save(root.path()).unwrap();
    says_the_same(&open(root.path()), &golden, "merged");
    let (before, after) = (biases(&open(&folder("merged"))), biases(&open(root.path())));
    assert!(before.len() == 8 && before.iter().zip(&after).all(|((a, x), (b, y))| a == b && x.equal(y)));
    let config = config_of(root.path());
    assert_eq!((config.get("auto_map"), &config["lora"]["r"]), (None, &json!(-1)));
    // The LLM alone would lose them.
    let error = model.save_llm(&root.path().join("llm")).unwrap_err().to_string();
    assert!(error.contains("biases from layers with adapters, for which a qwen2 has no place"), "{error}");
    // In bf16 they are merged weights like all others.
    let mut model = Vora::open(&folder("unmerged"), Device::Cpu, Kind::BFloat16).unwrap();
    model.merge().unwrap();
    assert!(biases(&model).iter().all(|(_, bias)| bias.kind() == Kind::BFloat16));
}

fn convert(from: &Path, out: &Path, to: Layout, base: &Path) -> Result<()> {
    let options = Options::default().with_layout(to);
    Conversion::plan(from, &options, &|_| Ok(base.to_owned()))?.write(out)
}

#[test]
fn official_folders_are_converted_with_their_biases() {
    let golden = fixtures::open("official");
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let whole = folder("unmerged");
    convert(&whole, &at("merged"), Layout::Vora, root.path()).unwrap();
    says_the_same(&open(&at("merged")), &golden, "merged");
    let config = config_of(&at("merged"));
    // What the official merge leaves is what its constructor needs to make room for the biases.
    assert_eq!((&config["lora"]["r"], config.get("auto_map")), (&json!(-1), None));

    convert(&whole, &at("llm"), Layout::FrozenLlm, root.path()).unwrap();
    let llm = Checkpoint::open(&at("llm")).unwrap();
    assert!(llm.names().all(|name| !name.contains("mlp.up_proj.bias") && !name.contains("lora")));
    assert_eq!(config_of(&at("llm"))["model_type"], "qwen2");
    convert(&whole, &at("adapter"), Layout::Peft, root.path()).unwrap();
    let vision = Checkpoint::open(&at("adapter").join("vision.safetensors")).unwrap();
    assert!(vision.names().any(|name| name == "llm.model.layers.1.mlp.up_proj.bias"));
    convert(&at("adapter"), &at("back"), Layout::VoraUnmerged, &at("llm")).unwrap();
    says_the_same(&open(&at("back")), &golden, "unmerged");
    assert_eq!(biases(&open(&at("back"))).len(), 8);
    let opened = vora_model::open(&at("adapter"), Device::Cpu, Kind::Float, &|_| Ok(at("llm"))).unwrap();
    says_the_same(&*opened, &golden, "unmerged");

    let error = format!("{:#}", convert(&at("merged"), &at("x"), Layout::Llm, root.path()).unwrap_err());
    assert!(error.contains("has 8 biases from layers with adapters"), "{error}");

    // Code that lies beside a model goes along with it.
    fs::create_dir(at("code")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(whole.join(file), at("code").join(file)).unwrap();
    }
    for file in ["configuration_vora.py", "modeling_vora.py"] {
        fs::write(at("code").join(file), "").unwrap();
    }
    convert(&at("code"), &at("moved"), Layout::Vora, root.path()).unwrap();
    assert!(at("moved").join("modeling_vora.py").exists() && config_of(&at("moved"))["auto_map"].is_object());
}

/// What the published code can open: one rank for all, no alpha, and a bias for each linear of a layer with adapters.
#[test]
fn what_is_written_unmerged_is_in_the_published_form() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let mut model = open(&folder("merged"));
    // One of ours over the same LLM, without biases, with ranks and scalings of its own.
    let lora = LoraConfig {
        lora_alpha: Some(6.0),
        target_modules: vec!["q_proj".into(), "mlp.up_proj".into()],
        rank_pattern: [("0.mlp.up_proj".to_owned(), 4)].into(),
        ..LoraConfig::new(2, 2)
    };
    let mut config = model.config().clone();
    config.lora = Some(lora);
    config.biases = None;
    config.llm_name = "base".into();
    let (frozen, random) = (model.tensors().unwrap(), fixtures::Random::new(3));
    let mut tensors: Vec<_> = frozen
        .into_iter()
        .filter(|(name, _)| !name.ends_with("o_proj.bias") && !name.contains("mlp") || name.ends_with("weight"))
        .collect();
    for layer in 0..2 {
        for (module, width, out, r) in
            [("self_attn.q_proj", 16, 16, 2), ("mlp.up_proj", 16, 24, if layer == 0 { 4 } else { 2 })]
        {
            let path = format!("llm.model.layers.{layer}.{module}");
            tensors.push((format!("{path}.lora_A.weight"), random.normal([r, width])));
            tensors.push((format!("{path}.lora_B.weight"), random.normal([out, r])));
        }
    }
    fs::create_dir(at("ours")).unwrap();
    save(&at("ours").join("model.safetensors"), &tensors, &[]).unwrap();
    fs::write(at("ours").join("config.json"), config.to_json().unwrap().to_string()).unwrap();
    let golden = fixtures::open("official");
    model = open(&at("ours"));
    let expected = logits(&model, &golden);

    convert(&at("ours"), &at("published"), Layout::VoraUnmerged, root.path()).unwrap();
    let found = config_of(&at("published"));
    assert_eq!(found["lora"], json!({"layers": 2, "r": 4, "target_modules": ["mlp.up_proj", "self_attn.q_proj"]}));
    fixtures::assert_close_to(&logits(&open(&at("published")), &golden), &expected, 1e-5);
    let written = Checkpoint::open(&at("published")).unwrap();
    for layer in 0..2 {
        let shape = |name: &str| written.info(&format!("llm.model.layers.{layer}.{name}")).unwrap().1.to_vec();
        assert_eq!((shape("mlp.up_proj.bias"), shape("mlp.up_proj.lora_A.weight")), (vec![24], vec![4, 16]));
        assert_eq!((shape("self_attn.q_proj.lora_B.weight"), shape("self_attn.q_proj.bias")), (vec![16, 4], vec![16]));
    }
    // Written once more, nothing changes.
    convert(&at("published"), &at("again"), Layout::VoraUnmerged, root.path()).unwrap();
    for file in ["config.json", "model.safetensors"] {
        assert_eq!(fs::read(at("again").join(file)).unwrap(), fs::read(at("published").join(file)).unwrap());
    }
}

/// The LLM below `unmerged`, as its own folder.
fn base(out: &Path) {
    convert(&folder("unmerged"), out, Layout::FrozenLlm, out).unwrap();
}

/// A run that goes on from one of the folders.
fn run(root: &Path, pretrained: &str, lora: &str, teacher: &str) -> TrainConfig {
    let text = format!(
        "output_dir: {root}/run\nmax_steps: 4\nbf16: false\nlearning_rate: 0.01\nmax_grad_norm: 0\n\
         model: {{llm: {root}/llm, pretrained: '{pretrained}', image_size: 12, patch_size: 4, lora: {lora}{teacher}}}\n\
         distill: {{pairing: input}}\ndata: {{train: {{scenes: {{image_size: 12}}}}}}\n",
        root = root.display(),
    );
    TrainConfig::parse(&text, &[]).unwrap()
}

fn student(config: &TrainConfig) -> Student {
    Student::new(config, Device::Cpu, Kind::Float, &|name| Ok(PathBuf::from(name))).unwrap()
}

fn batch(golden: &fixtures::Golden) -> DeviceBatch {
    let input = input(golden);
    DeviceBatch {
        positions: Tensor::from_slice(&[8i64, 9, 10, 13 + 10, 13 + 11]),
        targets: Tensor::from_slice(&[10i64, 11, 12, 16, 17]),
        pairs: Vec::new(),
        image_places: Tensor::from_slice(&input.spans.image_positions()),
        input,
    }
}

#[test]
fn an_official_folder_is_trained_on_as_its_own_code_does() {
    let golden = fixtures::open("official");
    let root = tempfile::tempdir().unwrap();
    base(&root.path().join("llm"));
    // A processor, as whoever copies the generation files beside a model has one.
    let whole = root.path().join("whole");
    fs::create_dir(&whole).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(folder("unmerged").join(file), whole.join(file)).unwrap();
    }
    fs::write(
        whole.join("preprocessor_config.json"),
        json!({"feature_extractor_type": "CLIPFeatureExtractor"}).to_string(),
    )
    .unwrap();
    let teacher = format!(", aux_vision: '{}', skip_aux_cls: true", folder("teacher").display());
    let lora = "{layers: 2, r: 3}";
    let config = run(root.path(), whole.to_str().unwrap(), lora, &teacher);
    let student = student(&config);
    let parameters = student.parameters();
    assert_eq!(parameters.iter().filter(|(name, _)| name.ends_with("_proj.bias")).count(), 8);
    let batch = batch(&golden);
    let mut optimizer = optimizer(student.parameters(), &config.optim()).unwrap();
    for step in 0..4 {
        optimizer.zero_grad().unwrap();
        let total = |losses: Losses| {
            let lm = losses.lm_sum / student.num_targets(&batch) as f64;
            let distill = losses.distill.unwrap();
            if step == 0 {
                fixtures::assert_close_to(&lm.detach(), &golden["unmerged.llm_loss"], 1e-5);
                let heads = losses.distill_blocks.unwrap();
                assert_eq!(heads.size(), [3]); // one for each of the teacher's blocks, though two layers are adapted
                for head in 0..3 {
                    let expected = &golden[&format!("unmerged.loss_aux_layer_{head}")];
                    fixtures::assert_close_to(&heads.get(head), expected, 1e-5);
                }
            }
            let loss = lm + distill;
            fixtures::assert_close_to(&loss.detach(), &golden["steps.losses"].get(step), 1e-4);
            loss
        };
        student.backward(&batch, DropoutSeed::new(0), total).unwrap();
        if step == 0 {
            for (name, parameter) in &parameters {
                fixtures::assert_close_to(&parameter.grad(), &golden[&format!("grads.{name}")], 1e-4);
            }
        }
        optimizer.step(1.0, 1.0).unwrap();
    }
    for (name, bias) in parameters.iter().filter(|(name, _)| name.ends_with("_proj.bias")) {
        fixtures::assert_close_to(&bias.detach(), &golden[&format!("steps.{name}")], 1e-3);
    }

    // Saved as a run saves it, its biases are there again.
    let out = root.path().join("final");
    fs::create_dir(&out).unwrap();
    Snapshot::of(&student).unwrap().write(&out).unwrap();
    let opened = vora_model::open(&out, Device::Cpu, Kind::Float, &|name| Ok(PathBuf::from(name))).unwrap();
    fixtures::assert_close_to(&logits(&*opened, &golden), &logits(&*student.model, &golden), 1e-6);
    assert_eq!(biases(&*opened).len(), 8);
}

#[test]
fn a_run_file_says_what_the_released_code_does_unasked() {
    let root = tempfile::tempdir().unwrap();
    base(&root.path().join("llm"));
    let keys = |more: &str| {
        let config = run(root.path(), "", "{layers: all, r: 3}", more);
        let config = student(&config).model.config_json().unwrap();
        (config["lora"]["layers"].clone(), config["fuse_adjacent_images"].clone(), config["pos_embed"].clone())
    };
    assert_eq!(keys(""), (json!(3), json!(false), json!("interpolate")));
    let released = keys(", fuse_adjacent_images: true, pos_embed: first_rows");
    assert_eq!(released, (json!(3), json!(true), json!("first_rows")));
    let causal = run(root.path(), "", "{r: 3}", ", vision_attention_mask: default");
    assert_eq!(student(&causal).model.vision_attention(), VisionAttention::Causal);
    let teacher =
        format!(", aux_vision: '{}', reuse_aux_vision_embedding_layers: preprocessor", folder("teacher").display());
    let copied = run(root.path(), "", "{r: 3}", &format!("{teacher}, reuse_aux_vision_start: copied"));
    let error = Student::new(&copied, Device::Cpu, Kind::Float, &|name| Ok(PathBuf::from(name))).unwrap_err();
    assert!(format!("{error:#}").contains("only AIMv2 in Apple's own layout"), "{error:#}");
}

/// The published recipe for fine-tuning: no adapters, the LLM frozen but for its biases.
#[test]
fn without_a_rank_a_merged_official_folder_is_tuned_as_released() {
    let golden = fixtures::open("official");
    let root = tempfile::tempdir().unwrap();
    base(&root.path().join("llm"));
    let merged = root.path().join("merged");
    fs::create_dir(&merged).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(folder("merged").join(file), merged.join(file)).unwrap();
    }
    fs::write(merged.join("preprocessor_config.json"), "{}").unwrap();
    let student = student(&run(root.path(), merged.to_str().unwrap(), "{layers: 2, r: -1}", ""));
    says_the_same(&*student.model, &golden, "merged");
    let names: Vec<String> = student.parameters().into_iter().map(|(name, _)| name).collect();
    let (biases, others): (Vec<_>, Vec<_>) = names.iter().partition(|name| name.ends_with("_proj.bias"));
    assert_eq!((biases.len(), others.len()), (8, 5), "{names:?}");
    assert!(others.iter().all(|name| name.starts_with("vision_embedding.")));
    // Its folder is a whole model, as its LLM is not the one that the run file names.
    let out = root.path().join("final");
    fs::create_dir(&out).unwrap();
    Snapshot::of(&student).unwrap().write(&out).unwrap();
    says_the_same(&open(&out), &golden, "merged");
    vora_student::parts::read(&student, &out).unwrap();
}
