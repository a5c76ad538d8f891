//! Folders of PEFT's, read, attached, merged and written again.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use fixtures::{Golden, assert_close, assert_close_to};
use serde_json::Value;
use tch::nn::Module;
use tch::{Device, Kind, Tensor};
use vora_torch::weights::{Init, Weights};

use super::config::{ADAPTER_TENSORS, BaseModel, CONFIG, PEFT_PREFIX};
use super::folder::{AdapterError, AdapterFolder, save_adapter};
use crate::attach::{Visit, attach_all};
use crate::config::LoraConfig;
use crate::linear::Linear;

fn peft_folder() -> PathBuf {
    fixtures::root().join("golden/lora_peft")
}

/// The reference's three layers of two linears, and the norm after them.
struct Model {
    layers: Vec<[(&'static str, Linear); 2]>,
    norm: [Tensor; 2],
}

impl Model {
    fn load(golden: &Golden, width: i64) -> Self {
        let weights = Weights::from_tensors(golden.under("peft.weights.model."), Device::Cpu, Kind::Float);
        let layer = |layer_idx: usize| {
            let at = weights.pp("layers").pp(layer_idx);
            let load = |name, out| (name, Linear::load(&at.pp(name), width, out, false).unwrap());
            [load("self_attn.q_proj", 8), load("self_attn.v_proj", 4)]
        };
        let norm = ["weight", "bias"].map(|name| weights.pp("norm").get(name, &[8], Init::Ones).unwrap());
        Self { layers: (0..3).map(layer).collect(), norm }
    }

    fn visit(&mut self, visit: &mut Visit<'_>) -> Result<()> {
        for (layer_idx, layer) in self.layers.iter_mut().enumerate() {
            for (module, linear) in layer {
                visit(&format!("model.layers.{layer_idx}.{module}"), linear)?;
            }
        }
        Ok(())
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let mut x = x.shallow_clone();
        for [(_, q_proj), (_, v_proj)] in &self.layers {
            x = &x + q_proj.forward(&x) + v_proj.forward(&x).repeat([1, 2]);
        }
        x.layer_norm([8], Some(&self.norm[0]), Some(&self.norm[1]), 1e-5, false)
    }

    fn attach(&mut self, folder: &Path) -> Result<usize> {
        let adapter = AdapterFolder::open(folder)?;
        let attached = adapter.attach("default", Device::Cpu, |visit| self.visit(visit))?;
        let weights = adapter.weights(Device::Cpu, Kind::Float)?.pp("model.norm");
        for (slot, name) in self.norm.iter_mut().zip(["weight", "bias"]) {
            *slot = weights.get(name, &[8], Init::Required)?;
        }
        Ok(attached)
    }
}

#[test]
fn reads_what_the_reference_wrote() {
    let golden = fixtures::open("lora");
    let mut model = Model::load(&golden, 8);
    assert_eq!(model.attach(&peft_folder()).unwrap(), 4);
    assert_close(&model.forward(&golden["peft.x"]), &golden["peft.y"]);
    let adapter = AdapterFolder::open(&peft_folder()).unwrap();
    assert_eq!((adapter.config().r, adapter.config().layers, adapter.config().scaling()), (2, 2, 3.0));
    assert_eq!(adapter.base_model(), None);
}

#[test]
fn writes_what_the_reference_would() {
    let golden = fixtures::open("lora");
    let adapter = AdapterFolder::open(&peft_folder()).unwrap();
    let tensors: Vec<(String, Tensor)> = Tensor::read_safetensors(peft_folder().join(ADAPTER_TENSORS))
        .unwrap()
        .into_iter()
        .map(|(name, t)| (name.strip_prefix(PEFT_PREFIX).unwrap().to_owned(), t))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    save_adapter(folder.path(), adapter.config(), BaseModel::new("some/base"), &tensors).unwrap();

    let read = |folder: &Path| -> Value { serde_json::from_slice(&fs::read(folder.join(CONFIG)).unwrap()).unwrap() };
    let (ours, theirs) = (read(folder.path()), read(&peft_folder()));
    for key in ["peft_type", "r", "layers_to_transform", "bias", "target_modules"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    assert_eq!(ours["lora_alpha"].as_f64(), theirs["lora_alpha"].as_f64());
    assert_eq!(ours["modules_to_save"], serde_json::json!(["model.norm"]));
    let mut model = Model::load(&golden, 8);
    assert_eq!(model.attach(folder.path()).unwrap(), 4);
    assert_close(&model.forward(&golden["peft.x"]), &golden["peft.y"]);
    let again = AdapterFolder::open(folder.path()).unwrap();
    again.expect(adapter.config()).unwrap();
    assert_eq!(again.base_model(), Some("some/base"));
}

#[test]
fn vora_scaling_survives_the_file() {
    let (config, folder) = (LoraConfig::new(3, 1), tempfile::tempdir().unwrap());
    let t = |shape: [i64; 2]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let name = |half| format!("model.layers.0.mlp.up_proj.{half}.weight");
    let tensors = [(name("lora_A"), t([3, 4])), (name("lora_B"), t([5, 3]))];
    save_adapter(folder.path(), &config, BaseModel::new("base"), &tensors).unwrap();
    let text = fs::read_to_string(folder.path().join(CONFIG)).unwrap();
    assert!(text.contains(r#""lora_alpha": 3.0"#), "{text}");
    assert_eq!(AdapterFolder::open(folder.path()).unwrap().config(), &config);
    // What the configuration leaves out is not written.
    let rest = |name: &str| format!("{name}.lora_A.weight");
    for (name, r, says) in [
        ("model.layers.1.mlp.up_proj", 3, "`layers_to_transform` leaves it out"),
        ("model.layers.0.mlp.xy_proj", 3, "`target_modules` leaves it out"),
        ("model.layers.0.mlp.up_proj", 2, "lora_A.weight` is [2, 4], but lora.r is 3"),
    ] {
        let error =
            save_adapter(folder.path(), &config, BaseModel::new("base"), &[(rest(name), t([r, 4]))]).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// Models of other people: linears in no layer, and layers where PEFT looks for none.
#[test]
fn any_model_comes_back_from_its_folder() {
    let cases: [(&[&str], LoraConfig, Value, Value); 3] = [
        (&["fc1", "fc2"], LoraConfig::of_modules(2, ["fc1", "fc2"]), serde_json::json!(["fc1", "fc2"]), Value::Null),
        (
            &["blocks.0.fc", "blocks.1.fc"],
            LoraConfig { target_modules: vec!["fc".into()], ..LoraConfig::new(2, 1) },
            serde_json::json!(["blocks.0.fc"]), // PEFT finds a layer's number behind two names only
            Value::Null,
        ),
        (
            &["net.blocks.0.fc", "net.blocks.1.fc"],
            LoraConfig { target_modules: vec!["fc".into()], ..LoraConfig::new(2, 1) },
            serde_json::json!(["fc"]),
            serde_json::json!([0]),
        ),
    ];
    for (paths, config, targets, layers) in cases {
        let source = Weights::random(1, Device::Cpu, Kind::Float);
        let model = || {
            let linear = |path: &&str| ((*path).to_owned(), Linear::load(&source.pp(path), 4, 4, false).unwrap());
            paths.iter().map(linear).collect::<Vec<_>>()
        };
        fn visit(model: &mut [(String, Linear)], visit: &mut Visit<'_>) -> Result<()> {
            model.iter_mut().try_for_each(|(path, linear)| visit(path, linear))
        }
        let (mut trained, adapters) = (model(), Weights::random(2, Device::Cpu, Kind::Float));
        attach_all("own", &config, &adapters, |walk| visit(&mut trained, walk)).unwrap();
        for (name, tensor) in adapters.parameters().iter().filter(|(name, _)| name.ends_with("lora_B.weight")) {
            let _ = tch::no_grad(|| tensor.shallow_clone().fill_(0.1 * name.len() as f64));
        }
        let folder = tempfile::tempdir().unwrap();
        save_adapter(folder.path(), &config, BaseModel::new("own/model"), &adapters.parameters()).unwrap();
        let json: Value = serde_json::from_slice(&fs::read(folder.path().join(CONFIG)).unwrap()).unwrap();
        assert_eq!(
            [&json["target_modules"], &json["layers_to_transform"], &json["task_type"]],
            [&targets, &layers, &Value::Null]
        );

        let mut opened = model();
        let attached =
            AdapterFolder::open(folder.path()).unwrap().attach("own", Device::Cpu, |walk| visit(&mut opened, walk));
        assert_eq!(attached.unwrap(), adapters.parameters().len() / 2);
        let x = Tensor::ones([1, 4], (Kind::Float, Device::Cpu));
        for ((_, trained), (path, opened)) in trained.iter().zip(&opened) {
            assert!(trained.forward(&x).equal(&opened.forward(&x)), "{path}");
        }
    }
}

#[test]
fn an_adapter_of_another_model_is_told() {
    let golden = fixtures::open("lora");
    let mut weights = golden.under("peft.weights.model.");
    for (name, t) in &mut weights {
        if name.ends_with("proj.weight") {
            *t = t.constant_pad_nd([0, 2]); // two more inputs
        }
    }
    let weights = Weights::from_tensors(weights, Device::Cpu, Kind::Float);
    let mut layers: Vec<Linear> = (0..2)
        .map(|i| Linear::load(&weights.pp(format!("layers.{i}.self_attn.q_proj")), 10, 8, false).unwrap())
        .collect();
    let adapter = AdapterFolder::open(&peft_folder()).unwrap();
    let error = adapter
        .attach("x", Device::Cpu, |visit| {
            layers.iter_mut().enumerate().try_for_each(|(i, linear)| {
                visit(&format!("model.layers.{i}.self_attn.q_proj"), linear)?;
                visit(
                    &format!("model.layers.{i}.self_attn.v_proj"),
                    &mut Linear::load(&weights.pp("layers.0.self_attn.v_proj"), 10, 4, false)?,
                )
            })
        })
        .unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("attaching the adapter") && text.contains("lora_peft"), "{text}");
    let misshapen =
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is [2, 8], the model expects [2, 10]";
    assert!(text.contains(misshapen), "{text}");
}

#[test]
fn what_differs_is_named_with_both_values() {
    let adapter = AdapterFolder::open(&peft_folder()).unwrap();
    let same = LoraConfig { lora_alpha: Some(6.0), ..adapter.config().clone() };
    adapter.expect(&same).unwrap();
    let cases = [
        (LoraConfig { r: 4, ..same.clone() }, "lora.r is 4, the adapter in", "has 2"),
        (LoraConfig { layers: 3, ..same.clone() }, "lora.layers is 3, the adapter in", "has 2"),
        (LoraConfig { lora_alpha: None, ..same.clone() }, "the scaling of lora is 1,", "is 3"),
        (LoraConfig { target_modules: vec!["o".into()], ..same }, "lora.target_modules is [\"o\"]", "\"v_proj\"]"),
    ];
    for (config, wanted, found) in cases {
        let error = adapter.expect(&config).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(AdapterError::OtherConfig { .. })), "{error:?}");
        let error = error.to_string();
        assert!(error.contains(wanted) && error.ends_with(found), "{error}");
    }
}

/// The layers of `fixtures/generate/peft_folders.py`.
struct Stack(Vec<[(&'static str, Linear); 2]>);

impl Stack {
    fn load(golden: &Golden) -> Self {
        let weights = Weights::from_tensors(golden.under("weights.model.layers."), Device::Cpu, Kind::Float);
        let load = |layer: usize, name: &'static str, out: i64, bias: bool| {
            (name, Linear::load(&weights.pp(layer).pp(name), 8, out, bias).unwrap())
        };
        let layer = |i| [load(i, "self_attn.q_proj", 8, false), load(i, "self_attn.v_proj", 4, true)];
        Self((0..3).map(layer).collect())
    }

    fn visit(&mut self, visit: &mut Visit<'_>) -> Result<()> {
        self.0.iter_mut().enumerate().try_for_each(|(layer_idx, layer)| {
            layer
                .iter_mut()
                .try_for_each(|(module, linear)| visit(&format!("model.layers.{layer_idx}.{module}"), linear))
        })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.0.iter().fold(x.shallow_clone(), |x, [(_, q_proj), (_, v_proj)]| {
            &x + q_proj.forward(&x) + v_proj.forward(&x).repeat([1, 2])
        })
    }

    /// Every tensor of its adapters, as [`save_adapter`] takes them.
    fn adapters(&mut self) -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        let mut take = |path: &str, linear: &mut Linear| {
            for adapter in linear.adapters() {
                tensors
                    .extend(adapter.tensors().map(|(name, tensor)| (format!("{path}.{name}"), tensor.shallow_clone())));
            }
            Ok(())
        };
        self.visit(&mut take).unwrap();
        tensors
    }
}

/// Each way that PEFT has to say which modules get which rank, and how many linears then have an adapter.
const CASES: [(&str, usize); 9] = [
    ("plain", 6),
    ("patterns", 6),
    ("rslora", 6),
    ("layers", 4),
    ("one_layer", 2),
    ("regex", 2),
    ("all_linear", 6),
    ("exclude", 5),
    ("dora", 6),
];

#[test]
fn every_option_of_the_reference_computes_and_merges_the_same() {
    let golden = fixtures::open("peft_folders");
    for (case, adapters) in CASES {
        let y = &golden[format!("{case}.y").as_str()];
        let written = tempfile::tempdir().unwrap();
        // As PEFT wrote it; then as we write it again.
        for rewritten in [false, true] {
            let theirs = fixtures::root().join("golden/peft_folders").join(case);
            let folder = AdapterFolder::open(if rewritten { written.path() } else { &theirs }).unwrap();
            let mut stack = Stack::load(&golden);
            let attached = folder.attach("x", Device::Cpu, |visit| stack.visit(visit)).unwrap();
            assert_eq!(attached, adapters, "{case}");
            assert_close_to(&stack.forward(&golden["x"]), y, 1e-5);
            if !rewritten {
                save_adapter(written.path(), folder.config(), BaseModel::new("base"), &stack.adapters()).unwrap();
                AdapterFolder::open(written.path()).unwrap().expect(folder.config()).unwrap();
            }
            for (layer_idx, layer) in stack.0.iter_mut().enumerate() {
                for (module, linear) in layer {
                    linear.merge();
                    let merged = format!("{case}.merged.model.layers.{layer_idx}.{module}.weight");
                    assert_close_to(&linear.weight(), &golden[merged.as_str()], 1e-6);
                }
            }
            assert_close_to(&stack.forward(&golden["x"]), y, 1e-5);
        }
        let theirs = fixtures::root().join("golden/peft_folders").join(case);
        let folder = AdapterFolder::open(&theirs).unwrap();
        let base = golden.under("weights.").into_iter();
        let adapter = Tensor::read_safetensors(theirs.join(ADAPTER_TENSORS)).unwrap().into_iter();
        let adapter = adapter.map(|(name, t)| (name.strip_prefix(PEFT_PREFIX).unwrap().to_owned(), t));
        for (name, merged) in crate::merge_state_dict(base.chain(adapter), folder.config()).unwrap() {
            if name.ends_with("weight") {
                assert_close_to(&merged, &golden[format!("{case}.merged.{name}").as_str()], 1e-6);
            }
        }
    }
}

#[test]
fn what_peft_says_in_our_words() {
    let config = |case: &str| {
        let folder = fixtures::root().join("golden/peft_folders").join(case);
        AdapterFolder::open(&folder).unwrap().config().clone()
    };
    let path = |layer: usize, module: &str| format!("model.layers.{layer}.self_attn.{module}_proj");
    let both = vec!["q_proj".to_owned(), "v_proj".to_owned()];
    let plain = LoraConfig { lora_alpha: Some(6.0), target_modules: both, ..LoraConfig::new(2, 3) };
    let sorted = |mut config: LoraConfig| {
        config.target_modules.sort();
        config
    };
    assert_eq!(sorted(config("plain")), plain);
    let patterns = LoraConfig {
        rank_pattern: [(path(0, "q"), 3), (path(1, "q"), 3), (path(1, "v"), 1), (path(2, "q"), 4)].into(),
        // PEFT takes `v_proj` for layer 1 as well: the pattern after it comes too late.
        alpha_pattern: [(path(0, "q"), 9.0), (path(0, "v"), 5.0), (path(1, "v"), 5.0), (path(2, "v"), 5.0)].into(),
        ..plain.clone()
    };
    assert_eq!(sorted(config("patterns")), patterns);
    let named = |paths: &[String]| LoraConfig { target_modules: paths.to_vec(), ..plain.clone() };
    assert_eq!(config("layers"), named(&[path(0, "q"), path(0, "v"), path(2, "q"), path(2, "v")]));
    assert_eq!(config("one_layer"), LoraConfig { layers: 2, ..named(&[path(1, "q"), path(1, "v")]) });
    assert_eq!(config("regex"), named(&[path(0, "v"), path(2, "v")]));
    assert_eq!(config("exclude").target_modules.len(), 5);
    assert!(config("rslora").use_rslora);
}

#[test]
fn a_dora_trains_and_merges_for_good() {
    let golden = fixtures::open("peft_folders");
    let mut stack = Stack::load(&golden);
    let folder = AdapterFolder::open(&fixtures::root().join("golden/peft_folders/dora")).unwrap();
    folder.attach("x", Device::Cpu, |visit| stack.visit(visit)).unwrap();
    stack.forward(&golden["x"]).square().sum(Kind::Float).backward();
    let q_proj = &mut stack.0[1][0].1;
    let adapter = q_proj.adapters().next().unwrap();
    assert_eq!(adapter.num_parameters(), 2 * 8 + 2 * 8 + 8);
    for trained in [adapter.lora_a(), adapter.lora_b(), adapter.magnitude().unwrap()] {
        assert!(trained.grad().abs().sum(Kind::Float).double_value(&[]) > 0.0);
    }
    let error = q_proj.merge_adapter("x").unwrap_err().to_string();
    assert!(error.contains("adapter `x` is a DoRA") && q_proj.adapters().count() == 1, "{error}");
}

#[test]
fn what_can_only_be_merged_is_not_attached() {
    let theirs: Value = serde_json::from_slice(&fs::read(peft_folder().join(CONFIG)).unwrap()).unwrap();
    let tensors = Tensor::read_safetensors(peft_folder().join(ADAPTER_TENSORS)).unwrap();
    type Change<'a> = &'a dyn Fn(&mut Value, &mut Vec<(String, Tensor)>);
    let attach = |change: Change<'_>| {
        let folder = tempfile::tempdir().unwrap();
        let (mut config, mut tensors) =
            (theirs.clone(), tensors.iter().map(|(name, t)| (name.clone(), t.shallow_clone())).collect());
        change(&mut config, &mut tensors);
        fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
        vora_torch::checkpoint::save(&folder.path().join(ADAPTER_TENSORS), &tensors, &[]).unwrap();
        let adapter = AdapterFolder::open(folder.path())?;
        let expected = adapter.expect(adapter.config());
        let golden = fixtures::open("lora");
        let attached = Model::load(&golden, 8).attach(folder.path()).map(drop);
        assert_eq!(expected.is_ok(), attached.is_ok());
        attached
    };
    attach(&|_, _| ()).unwrap();
    // PEFT says itself that it means nothing at a linear layer.
    attach(&|config, _| config["fan_in_fan_out"] = true.into()).unwrap();
    for bias in ["all", "lora_only"] {
        let error = attach(&|config, _| config["bias"] = bias.into()).unwrap_err().to_string();
        assert!(error.contains(&format!("`bias` is `{bias}`")) && error.contains("`vora convert` does"), "{error}");
    }
    let embedding = |a: i64| {
        move |config: &mut Value, tensors: &mut Vec<(String, Tensor)>| {
            let names = config["target_modules"].as_array_mut().unwrap();
            names.push("embed_tokens".into());
            for (half, shape) in [("A", [a, 7]), ("B", [8, 2])] {
                let name = format!("{PEFT_PREFIX}model.embed_tokens.lora_embedding_{half}");
                tensors.push((name, Tensor::zeros(shape, (Kind::Float, Device::Cpu))));
            }
            // It is named by its last part, and lies in no layer.
            config["layers_to_transform"] = Value::Null;
        }
    };
    let error = attach(&embedding(2)).unwrap_err().to_string();
    assert!(error.contains("LoRA on the embedding model.embed_tokens, which can only be merged"), "{error}");
    let error = attach(&embedding(3)).unwrap_err().to_string();
    assert!(error.contains("embed_tokens.lora_embedding_A` is [3, 7], but r is 2"), "{error}");
}

#[test]
fn errors_name_file_and_key() {
    let folder = tempfile::tempdir().unwrap();
    let open = || format!("{:#}", AdapterFolder::open(folder.path()).unwrap_err());
    assert!(open().contains("adapter_config.json"), "{}", open());
    let config: Value = serde_json::from_slice(&fs::read(peft_folder().join(CONFIG)).unwrap()).unwrap();
    let write = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
    };
    write("r", 2.into());
    assert!(open().contains(ADAPTER_TENSORS), "{}", open());
    fs::copy(peft_folder().join(ADAPTER_TENSORS), folder.path().join(ADAPTER_TENSORS)).unwrap();
    let json = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    let cases = [
        ("peft_type", "IA3".into(), "`peft_type` is `IA3`, expected `LORA`"),
        ("bias", "some".into(), "`bias` is `some`, expected `none`, `all` or `lora_only`"),
        ("lora_bias", true.into(), "`lora_bias` is true"),
        ("use_qalora", true.into(), "`use_qalora` is true"),
        ("layer_replication", json("[[0, 2]]"), "`layer_replication` is [[0,2]]"),
        ("target_parameters", json(r#"["experts"]"#), r#"`target_parameters` is ["experts"]"#),
        ("trainable_token_indices", json("[1]"), "`trainable_token_indices` is [1]"),
        ("kasa_config", json(r#"{"beta": 1}"#), "`kasa_config` is"),
        ("a_variant_to_come", json(r#"{"k": 1}"#), "`a_variant_to_come` is"),
        ("init_lora_weights", "pissa_niter_4".into(), "`init_lora_weights` is `pissa_niter_4`"),
        ("use_dora", true.into(), "q_proj.lora_magnitude_vector`, but `use_dora` is true"),
        ("rank_pattern", json(r#"{"q_proj": 3}"#), "q_proj.lora_A.weight` is [2, 8], but r is 3 in"),
        ("rank_pattern", json(r#"{"(q_proj": 2}"#), "`rank_pattern`: `(q_proj` is no regular expression"),
        ("rank_pattern", json(r#"{"q_proj": 0}"#), "lora.r is 0 for model.layers.0.self_attn.q_proj"),
        ("target_modules", Value::Null, "`target_modules` is missing"),
        (
            "target_modules",
            ".*q_proj".into(),
            "v_proj` has an adapter in adapter_model.safetensors, but `target_modules`",
        ),
        ("target_modules", "((".into(), "`target_modules`: `((` is no regular expression"),
        (
            "exclude_modules",
            json(r#"["q_proj"]"#),
            "q_proj` has an adapter in adapter_model.safetensors, but `exclude_",
        ),
        ("layers_to_transform", json("[1, 2]"), "layers.0.self_attn.q_proj` has an adapter in"),
        ("layers_to_transform", 1.into(), "but `layers_to_transform` leaves it out"),
        ("r", 4.into(), "`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` is [2, 8], but r is 4 in"),
        ("r", 0.into(), "lora.r is 0"),
        ("r", "two".into(), "is not a LoRA's"),
        ("modules_to_save", json(r#"["norm", "lm_head"]"#), "lists `lm_head`, which was trained as a whole, but"),
        ("modules_to_save", json(r#"["layers.1.norm"]"#), "lists `layers.1.norm`"),
    ];
    for (key, value, expected) in cases {
        write(key, value);
        assert!(open().contains(expected) && open().contains("adapter_"), "{key}: {}", open());
    }
    // PEFT's rule: the end of a module's path.
    for named in ["norm", "model.norm", "orm"] {
        write("modules_to_save", json(&format!(r#"["{named}"]"#)));
        assert!(AdapterFolder::open(folder.path()).is_ok(), "{named}");
    }
    // Without a list, the tensors tell how many layers; rank-stabilised scaling is alpha over the root of r.
    write("layers_to_transform", Value::Null);
    assert_eq!(AdapterFolder::open(folder.path()).unwrap().config().layers, 2);
    write("use_rslora", true.into());
    assert!(AdapterFolder::open(folder.path()).unwrap().config().use_rslora);
    let scaling = AdapterFolder::open(folder.path()).unwrap().config().scaling();
    assert!((scaling - 6.0 / 2f64.sqrt()).abs() < 1e-12, "{scaling}");
}
