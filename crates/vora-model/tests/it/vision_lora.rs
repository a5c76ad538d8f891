//! A vision tower with adapters, and one that is trained whole, as Hugging Face's LLaVA has them under PEFT.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use fixtures::{Golden, assert_close_to};
use serde_json::Value;
use tch::{Device, Kind, Tensor};
use vora_lora::{AdapterFolder, BaseModel, LoraConfig, PEFT_PREFIX, save_adapter};
use vora_model::convert::{Conversion, Layout, Options};
use vora_model::trained::Parts;
use vora_model::{ALL_LINEAR, Input, Llava, LlavaConfig, VisionLanguageModel};
use vora_text::{Span, Spans};
use vora_torch::checkpoint::{Checkpoint, save};
use vora_torch::weights::Weights;
use vora_vision::{Encoder, EncoderConfig};

const CASES: [&str; 3] = ["clip", "siglip", "dinov2"];

fn json() -> Value {
    serde_json::from_slice(&std::fs::read(fixtures::root().join("golden/vision_lora.json")).unwrap()).unwrap()
}

fn config(name: &str) -> LlavaConfig {
    let folder = tempfile::tempdir().unwrap();
    save_folder(folder.path(), &json()[name]["config"], &[]);
    LlavaConfig::open(folder.path()).unwrap()
}

fn save_folder(folder: &Path, config: &Value, tensors: &[(String, Tensor)]) {
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    save(&folder.join("model.safetensors"), tensors, &[]).unwrap();
}

/// The encoder's folder.
fn tower(golden: &Golden, name: &str, folder: &Path) {
    let tensors = golden.under(&format!("{name}.weights.vision_tower."));
    save_folder(folder, &json()[name]["config"]["vision_config"], &tensors);
}

fn llm(golden: &Golden, name: &str) -> Weights {
    Weights::from_tensors(golden.under(&format!("{name}.weights.language_model.")), Device::Cpu, Kind::Float)
}

/// Gives new weights the golden projection.
fn with_projection(golden: &Golden, name: &str, new: &Weights) {
    for (parameter, tensor) in new.parameters() {
        if parameter.starts_with("multi_modal_projector.") {
            let value = &golden[&format!("{name}.weights.{parameter}")];
            tch::no_grad(|| tensor.shallow_clone().copy_(value));
        }
    }
}

/// With adapters on LLM and tower, their values PEFT's.
fn adapted(golden: &Golden, name: &str, folder: &Path) -> (Llava, Weights) {
    let new = Weights::random(1, Device::Cpu, Kind::Float);
    let encoder = Encoder::open(folder, Device::Cpu, Kind::Float).unwrap();
    let mut config = config(name);
    config.lora = Some(LoraConfig { lora_alpha: Some(3.0), ..LoraConfig::new(2, 2) });
    config.vision_lora = Some(LoraConfig { lora_alpha: Some(1.5), ..LoraConfig::of_modules(3, [ALL_LINEAR]) });
    let model = Llava::assemble(config, &llm(golden, name), encoder, &new).unwrap();
    with_projection(golden, name, &new);
    for (parameter, tensor) in new.parameters().iter().filter(|(parameter, _)| parameter.contains(".lora_")) {
        let value = &golden[&format!("{name}.adapter.{PEFT_PREFIX}{}", model.peft_name(parameter).unwrap())];
        tch::no_grad(|| tensor.shallow_clone().copy_(value));
    }
    (model, new)
}

fn input(golden: &Golden, name: &str, model: &Llava) -> Input {
    let (rows, cols) = model.image_grid(8, 8).unwrap();
    let row = |before, after| vec![Span::text(before), Span::image(rows, cols), Span::text(after)];
    let input_ids = golden[&format!("{name}.input_ids")].shallow_clone();
    Input::new(input_ids, golden["pixel_values"].unbind(0), Spans::new(vec![row(3, 4), row(1, 3)]))
}

/// The rows without their padding, one after the other.
fn told(rows: &Tensor, input: &Input) -> Tensor {
    let lens = input.spans.row_lens();
    Tensor::cat(&(0..).zip(lens).map(|(row, len)| rows.get(row).narrow(0, 0, len)).collect::<Vec<_>>(), 0)
}

fn logits(model: &Llava, input: &Input) -> Tensor {
    told(&model.llm().logits(&model.forward(input, 0).unwrap().last_hidden_state), input)
}

fn names(tensors: &[(String, Tensor)]) -> BTreeSet<String> {
    tensors.iter().map(|(name, _)| name.clone()).collect()
}

#[test]
fn adapters_on_both_are_pefts() {
    let golden = fixtures::open("vision_lora");
    let root = tempfile::tempdir().unwrap();
    for name in CASES {
        let at = |folder: &str| root.path().join(format!("{name}-{folder}"));
        tower(&golden, name, &at("tower"));
        let (mut model, new) = adapted(&golden, name, &at("tower"));
        let input = input(&golden, name, &model);
        let expected = told(&golden[&format!("{name}.logits")], &input);

        // One forward pass, and one backward.
        let found = logits(&model, &input);
        assert_close_to(&found, &expected, 2e-5);
        found.square().mean(Kind::Float).backward();
        let parts = Parts::of(new.parameters(), &model);
        let peft = golden.under(&format!("{name}.adapter.{PEFT_PREFIX}"));
        assert_eq!(names(&parts.adapter), names(&peft), "{name}");
        for (parameter, tensor) in &parts.adapter {
            assert_close_to(&tensor.grad(), &golden[&format!("{name}.grad.{PEFT_PREFIX}{parameter}")], 2e-5);
        }

        // The folder is one that PEFT would have written, module by module.
        let lora = model.peft_config().unwrap().unwrap();
        save_adapter(&at("ours"), &lora, BaseModel::new("base"), &parts.adapter).unwrap();
        let ours = AdapterFolder::open(&at("ours")).unwrap();
        ours.expect(&lora).unwrap();
        std::fs::create_dir(at("theirs")).unwrap();
        let text = json()[name]["adapter_config"].to_string();
        std::fs::write(at("theirs").join("adapter_config.json"), text).unwrap();
        let file = golden.under(&format!("{name}.adapter.")).into_iter().collect::<Vec<_>>();
        save(&at("theirs").join("adapter_model.safetensors"), &file, &[]).unwrap();
        let theirs = AdapterFolder::open(&at("theirs")).unwrap();
        for module in peft.iter().filter_map(|(tensor, _)| vora_lora::adapted_module(tensor)) {
            assert_eq!(ours.config().rank(module).unwrap(), theirs.config().rank(module).unwrap(), "{module}");
        }

        // Below them lies the model that PEFT puts them on; merged, here and by name, they are the same model.
        let (mut base, _) = adapted(&golden, name, &at("tower"));
        let error = base.save(&at("base")).unwrap_err().to_string();
        assert!(error.contains("merge first"), "{error}");
        base.detach().unwrap();
        assert!(base.lora().is_none() && base.vision_lora().is_none());
        let frozen = told(&golden[&format!("{name}.frozen_logits")], &input);
        assert_close_to(&tch::no_grad(|| logits(&base, &input)), &frozen, 2e-5);
        base.save(&at("base")).unwrap();
        model.merge().unwrap();
        assert!(model.vision_lora().is_none());
        assert_close_to(&tch::no_grad(|| logits(&model, &input)), &expected, 2e-5);
        model.save(&at("merged")).unwrap();
        let again = Llava::open(&at("merged"), Device::Cpu, Kind::Float).unwrap();
        assert!(tch::no_grad(|| logits(&again, &input)).equal(&tch::no_grad(|| logits(&model, &input))));
        let options = Options::default().with_layout(Layout::Llava);
        let conversion = Conversion::plan(&at("ours"), &options, &|_| Ok(at("base"))).unwrap();
        conversion.write(&at("converted")).unwrap();
        let (merged, converted) =
            (Checkpoint::open(&at("merged")).unwrap(), Checkpoint::open(&at("converted")).unwrap());
        assert!(merged.names().eq(converted.names()));
        for tensor in merged.names() {
            assert_close_to(&converted.tensor(tensor).unwrap(), &merged.tensor(tensor).unwrap(), 1e-6);
        }
    }
}

#[test]
fn a_tower_that_is_trained_whole_has_the_references_gradients() {
    let golden = fixtures::open("vision_lora");
    let root = tempfile::tempdir().unwrap();
    for name in CASES {
        let folder = root.path().join(name);
        tower(&golden, name, &folder);
        let config = config(name);
        let open = |changed: Vec<(String, Tensor)>, kind| {
            Encoder::open_trained(&folder, changed, &config.features, Device::Cpu, kind).unwrap()
        };
        let (encoder, weights) = open(Vec::new(), Kind::Float);
        let new = Weights::random(1, Device::Cpu, Kind::Float);
        let model = Llava::assemble(config.clone(), &llm(&golden, name), encoder, &new).unwrap();
        with_projection(&golden, name, &new);
        let input = input(&golden, name, &model);
        let expected: BTreeMap<String, Tensor> =
            golden.under(&format!("{name}.tower_grad.vision_tower.")).into_iter().collect();
        for _ in 0..2 {
            let found = logits(&model, &input);
            assert_close_to(&found, &told(&golden[&format!("{name}.frozen_logits")], &input), 2e-5);
            found.square().mean(Kind::Float).backward();
            let parameters = weights.parameters();
            assert_eq!(names(&parameters), expected.keys().cloned().collect(), "{name}: those that a loss reaches");
            for (parameter, mut tensor) in parameters {
                assert_close_to(&tensor.grad(), &expected[&parameter], 2e-5);
                tensor.zero_grad();
            }
        }

        // What it learned is seen by the next pass, written, and read again.
        for (_, tensor) in weights.parameters() {
            let _ = tch::no_grad(|| tensor.shallow_clone().g_mul_scalar_(1.5));
        }
        let learned = tch::no_grad(|| logits(&model, &input));
        assert!(!learned.allclose(&told(&golden[&format!("{name}.frozen_logits")], &input), 1e-3, 1e-3, false));
        model.save(&folder.join("whole")).unwrap();
        let again = Llava::open(&folder.join("whole"), Device::Cpu, Kind::Float).unwrap();
        assert!(tch::no_grad(|| logits(&again, &input)).equal(&learned));
        let changed =
            weights.parameters().into_iter().map(|(name, tensor)| (name, tensor.detach())).collect::<Vec<_>>();
        let again = |kind| {
            let encoder = Encoder::open_with(
                &folder,
                changed.iter().map(|(n, t)| (n.clone(), t.copy())).collect(),
                Device::Cpu,
                kind,
            );
            encoder.unwrap().features(&golden["pixel_values"], &config.features).unwrap()
        };
        let trained = |kind| {
            let changed = changed.iter().map(|(n, t)| (n.clone(), t.copy())).collect();
            tch::no_grad(|| open(changed, kind).0.features(&golden["pixel_values"], &config.features)).unwrap()
        };
        assert!(again(Kind::Float).equal(&trained(Kind::Float)), "{name}");
        let (bf16, masters) = (again(Kind::BFloat16), trained(Kind::BFloat16));
        assert_eq!((bf16.kind(), masters.kind()), (Kind::BFloat16, Kind::BFloat16));
        assert_close_to(&masters.to_kind(Kind::Float), &bf16.to_kind(Kind::Float), 0.1);
    }
}

#[test]
fn modules_are_called_what_their_classes_call_them() {
    let json = json();
    let families = json["modules"].as_array().unwrap();
    assert_eq!(families.len(), 7);
    for family in families {
        let config = EncoderConfig::from_json(&family["config"]).unwrap();
        let names = family["names"].as_object().unwrap();
        assert!(names.len() >= 8, "{names:?}");
        for (stored, own) in names {
            assert_eq!(&config.module_name(stored), own.as_str().unwrap());
            assert_eq!(
                &config.module_name(&format!("vision_model.{stored}")).replace("vision_model.", ""),
                own.as_str().unwrap()
            );
        }
    }
}

#[test]
fn what_matches_nothing_in_the_tower_is_told() {
    let golden = fixtures::open("vision_lora");
    let folder = tempfile::tempdir().unwrap();
    tower(&golden, "clip", folder.path());
    let refuse = |lora: LoraConfig, change: &dyn Fn(&mut LlavaConfig)| {
        let mut config = config("clip");
        config.vision_lora = Some(lora);
        change(&mut config);
        let encoder = Encoder::open(folder.path(), Device::Cpu, Kind::Float).unwrap();
        let new = Weights::random(1, Device::Cpu, Kind::Float);
        format!("{:#}", Llava::assemble(config, &llm(&golden, "clip"), encoder, &new).unwrap_err())
    };
    let none = |_: &mut LlavaConfig| {};
    let error = refuse(LoraConfig::of_modules(2, ["self_attn.q_proj", "o_proj"]), &none);
    assert_eq!(
        error,
        "vision_lora.target_modules: [\"o_proj\"] match no linear layer of the model, which has self_attn.q_proj, \
         self_attn.k_proj, self_attn.v_proj, self_attn.out_proj, mlp.fc1, mlp.fc2"
    );
    let many = LoraConfig { layers: 2, ..LoraConfig::of_modules(2, ["fc1"]) };
    assert_eq!(refuse(many, &none), "vision_lora.layers is 2, the model has 1 layers");
    let pattern = LoraConfig { rank_pattern: [("fc3".to_owned(), 4)].into(), ..LoraConfig::of_modules(2, ["fc1"]) };
    assert!(refuse(pattern, &none).starts_with("vision_lora.rank_pattern: `fc3` matches no linear layer that gets"));
    let error = refuse(LoraConfig::of_modules(2, ["fc1"]), &|config| {
        config.features = serde_json::from_value(serde_json::json!({"vision_feature_layer": 0})).unwrap();
    });
    assert!(error.contains("reads what goes into the encoder's first block"), "{error}");
}
