//! PEFT's adapter folder, in and out: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};
use vora_torch::safetensors::{Checkpoint, save, write_atomically};
use vora_torch::weights::Weights;

use crate::LoraConfig;
use crate::attach::{Visit, attach_all};

/// What PEFT puts before every tensor's name in the base model.
const PREFIX: &str = "base_model.model.";
const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The keys of `adapter_config.json` that say what the tensors mean; others pass.
#[derive(Debug, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    r: i64,
    lora_alpha: f64,
    target_modules: Value,
    #[serde(default)]
    layers_to_transform: Option<Vec<i64>>,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default = "none")]
    bias: String,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    rank_pattern: Map<String, Value>,
    #[serde(default)]
    alpha_pattern: Map<String, Value>,
}

fn none() -> String {
    "none".to_owned()
}

/// An adapter folder: what PEFT's `save_pretrained` or [`save_adapter`] wrote.
#[derive(Debug)]
pub struct AdapterFolder {
    path: PathBuf,
    config: LoraConfig,
    base_model: Option<String>,
}

impl AdapterFolder {
    /// Reads the configuration and the tensors' shapes.
    ///
    /// Errors name the file and the key or tensor: not LoRA, a variant that is more than `W + scaling * B A`, layers
    /// that are not the first ones, a tensor of another rank than the configuration's.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let peft: PeftConfig =
            serde_json::from_slice(&text).with_context(|| format!("{} is not a LoRA's", path.display()))?;
        let in_file = || format!("in {}", path.display());
        let tensors = Checkpoint::open(&folder.join(TENSORS))?;
        let config = peft.lora_config(num_layers(&tensors)).with_context(in_file)?;
        config.validate().with_context(in_file)?;
        for name in tensors.names() {
            let (_, shape) = tensors.info(name).expect("a name of this file");
            let r = if name.ends_with(".lora_A.weight") {
                shape.first()
            } else if name.ends_with(".lora_B.weight") {
                shape.get(1)
            } else {
                continue;
            };
            ensure!(
                r == Some(&config.r),
                "{}: tensor `{name}` is {shape:?}, but r is {} in {CONFIG}",
                folder.join(TENSORS).display(),
                config.r
            );
        }
        Ok(Self { path: folder.to_owned(), config, base_model: peft.base_model_name_or_path })
    }

    /// What the adapter adapts.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The model it was made for, as it was called where it was made.
    pub fn base_model(&self) -> Option<&str> {
        self.base_model.as_deref()
    }

    /// An error that names the first key in which the adapter is not what `config` asks for, with both values.
    pub fn expect(&self, config: &LoraConfig) -> Result<()> {
        let at = self.path.display();
        let (found, wanted) = (&self.config, config);
        ensure!(found.r == wanted.r, "lora.r is {}, the adapter in {at} has {}", wanted.r, found.r);
        let (layers, has) = (wanted.layers, found.layers);
        ensure!(has == layers, "lora.layers is {layers}, the adapter in {at} has {has}");
        let (scaling, has) = (wanted.scaling(), found.scaling());
        ensure!((has - scaling).abs() < 1e-9, "the scaling of lora is {scaling}, that of the adapter in {at} is {has}");
        let sorted = |config: &LoraConfig| {
            let mut targets = config.target_modules.clone();
            targets.sort();
            targets
        };
        let (targets, has) = (sorted(wanted), sorted(found));
        ensure!(has == targets, "lora.target_modules is {targets:?}, the adapter in {at} has {has:?}");
        Ok(())
    }

    /// Its tensors by their names in the base model, adapters and modules saved whole alike.
    pub fn weights(&self, device: Device, kind: Kind) -> Result<Weights> {
        Ok(Weights::open(&self.path.join(TENSORS), device, kind)?.pp(PREFIX.trim_end_matches('.')))
    }

    /// Attaches it as `name` to the linears of a model whose layers lie at `layers` (`model.layers`) in it, and says
    /// how many those were; see [`attach_all`].
    ///
    /// Errors list what does not fit: an adapter of another model. Modules saved whole are left to the caller, who
    /// finds them in [`AdapterFolder::weights`].
    pub fn attach(
        &self,
        name: &str,
        layers: &str,
        device: Device,
        linears: impl FnOnce(&mut Visit<'_>) -> Result<()>,
    ) -> Result<usize> {
        let doing = || match &self.base_model {
            Some(base) => format!("attaching the adapter {}, made for {base}", self.path.display()),
            None => format!("attaching the adapter {}", self.path.display()),
        };
        let weights = self.weights(device, Kind::Float)?;
        let attached = attach_all(name, &self.config, &weights.pp(layers), linears).with_context(doing)?;
        weights.finish_allowing(|name| !is_half(name)).with_context(doing)?;
        Ok(attached)
    }
}

impl PeftConfig {
    /// `layers` is how many layers the tensors speak of.
    fn lora_config(&self, layers: i64) -> Result<LoraConfig> {
        ensure!(self.peft_type == "LORA", "`peft_type` is `{}`, expected `LORA`", self.peft_type);
        ensure!(self.bias == "none", "`bias` is `{}`, expected `none`", self.bias);
        ensure!(!self.use_dora, "`use_dora` is true: only plain LoRA can be read");
        ensure!(!self.fan_in_fan_out, "`fan_in_fan_out` is true: only weights of [out, in] can be read");
        let patterns = [("rank_pattern", &self.rank_pattern), ("alpha_pattern", &self.alpha_pattern)];
        for (key, pattern) in patterns {
            ensure!(pattern.is_empty(), "`{key}` is not empty: only one rank and scaling for all can be read");
        }
        let targets: Option<Vec<String>> = serde_json::from_value(self.target_modules.clone()).ok();
        let target_modules = targets
            .with_context(|| format!("`target_modules` is {}, expected a list of names", self.target_modules))?;
        if let Some(listed) = &self.layers_to_transform {
            let first: Vec<i64> = (0..listed.len() as i64).collect();
            ensure!(*listed == first, "`layers_to_transform` is {listed:?}, expected the first layers: 0, 1, 2, ..");
        }
        let layers = self.layers_to_transform.as_ref().map_or(layers, |listed| listed.len() as i64);
        // PEFT divides by r, and in its rank-stabilised form by the root of r; here alpha is always over r.
        let alpha = if self.use_rslora { self.lora_alpha * (self.r as f64).sqrt() } else { self.lora_alpha };
        let lora_alpha = (alpha != self.r as f64).then_some(alpha);
        Ok(LoraConfig { layers, r: self.r, lora_alpha, target_modules })
    }
}

fn is_half(name: &str) -> bool {
    name.contains(".lora_A.") || name.contains(".lora_B.")
}

/// One more than the largest layer index among the adapters: the first number in a name's path.
fn num_layers(tensors: &Checkpoint) -> i64 {
    let layer = |name: &str| name.split('.').find_map(|part| part.parse::<i64>().ok());
    tensors.names().filter(|name| is_half(name)).filter_map(layer).max().map_or(1, |last| last.saturating_add(1))
}

/// Writes an adapter folder that PEFT's `from_pretrained` reads; each file is written beside its place and renamed.
///
/// `tensors` go by their names in the base model: `<path>.lora_A.weight`, `<path>.lora_B.weight`, and modules saved
/// whole. `base_model` is where PEFT finds the base: a hub name or a folder.
pub fn save_adapter(folder: &Path, config: &LoraConfig, base_model: &str, tensors: &[(String, Tensor)]) -> Result<()> {
    config.validate()?;
    let mut whole: BTreeMap<&str, ()> = BTreeMap::new();
    for (name, _) in tensors.iter().filter(|(name, _)| !is_half(name)) {
        let (module, _) = name.rsplit_once('.').with_context(|| format!("tensor `{name}` belongs to no module"))?;
        whole.insert(module, ());
    }
    let modules_to_save: Vec<String> = whole.into_keys().map(str::to_owned).collect();
    let peft = PeftConfig {
        peft_type: "LORA".to_owned(),
        task_type: Some("CAUSAL_LM".to_owned()),
        base_model_name_or_path: Some(base_model.to_owned()),
        r: config.r,
        lora_alpha: config.scaling() * config.r as f64,
        target_modules: config.target_modules.clone().into(),
        layers_to_transform: Some((0..config.layers).collect()),
        modules_to_save: (!modules_to_save.is_empty()).then_some(modules_to_save),
        bias: none(),
        lora_dropout: 0.0,
        inference_mode: true,
        use_rslora: false,
        use_dora: false,
        fan_in_fan_out: false,
        rank_pattern: Map::new(),
        alpha_pattern: Map::new(),
    };
    let tensors: Vec<(String, Tensor)> =
        tensors.iter().map(|(name, t)| (format!("{PREFIX}{name}"), t.shallow_clone())).collect();
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    save(&folder.join(TENSORS), &tensors, &[])?;
    let json = serde_json::to_vec_pretty(&peft)?;
    write_atomically(&folder.join(CONFIG), |file| Ok(file.write_all(&json)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Linear;
    use fixtures::{Golden, assert_close};
    use tch::nn::Module;
    use vora_torch::Init;

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
                    visit(layer_idx, module, linear)?;
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
            let attached = adapter.attach("default", "model.layers", Device::Cpu, |visit| self.visit(visit))?;
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
        let tensors: Vec<(String, Tensor)> = Tensor::read_safetensors(peft_folder().join(TENSORS))
            .unwrap()
            .into_iter()
            .map(|(name, t)| (name.strip_prefix(PREFIX).unwrap().to_owned(), t))
            .collect();
        let folder = tempfile::tempdir().unwrap();
        save_adapter(folder.path(), adapter.config(), "some/base", &tensors).unwrap();

        let read =
            |folder: &Path| -> Value { serde_json::from_slice(&fs::read(folder.join(CONFIG)).unwrap()).unwrap() };
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
        let name = |half| format!("layers.0.mlp.up_proj.{half}.weight");
        let tensors = [(name("lora_A"), t([3, 4])), (name("lora_B"), t([5, 3]))];
        save_adapter(folder.path(), &config, "base", &tensors).unwrap();
        let text = fs::read_to_string(folder.path().join(CONFIG)).unwrap();
        assert!(text.contains(r#""lora_alpha": 3.0"#), "{text}");
        assert_eq!(AdapterFolder::open(folder.path()).unwrap().config(), &config);
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
            .attach("x", "model.layers", Device::Cpu, |visit| {
                layers.iter_mut().enumerate().try_for_each(|(i, linear)| {
                    visit(i, "self_attn.q_proj", linear)?;
                    visit(
                        i,
                        "self_attn.v_proj",
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
            let error = adapter.expect(&config).unwrap_err().to_string();
            assert!(error.contains(wanted) && error.ends_with(found), "{error}");
        }
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
        assert!(open().contains(TENSORS), "{}", open());
        fs::copy(peft_folder().join(TENSORS), folder.path().join(TENSORS)).unwrap();
        let cases: [(&str, Value, &str); 9] = [
            ("peft_type", "IA3".into(), "`peft_type` is `IA3`, expected `LORA`"),
            ("bias", "all".into(), "`bias` is `all`"),
            ("use_dora", true.into(), "`use_dora` is true"),
            ("rank_pattern", serde_json::json!({"q_proj": 3}), "`rank_pattern` is not empty"),
            ("target_modules", ".*q_proj".into(), "`target_modules` is \".*q_proj\", expected a list"),
            ("layers_to_transform", serde_json::json!([1, 2]), "`layers_to_transform` is [1, 2]"),
            (
                "r",
                4.into(),
                "`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` is [2, 8], but r is 4 in",
            ),
            ("r", 0.into(), "lora.r is 0"),
            ("r", "two".into(), "is not a LoRA's"),
        ];
        for (key, value, expected) in cases {
            write(key, value);
            assert!(open().contains(expected) && open().contains("adapter_"), "{key}: {}", open());
        }
        // Without a list, the tensors tell how many layers; rank-stabilised scaling is alpha over the root of r.
        write("layers_to_transform", Value::Null);
        assert_eq!(AdapterFolder::open(folder.path()).unwrap().config().layers, 2);
        write("use_rslora", true.into());
        let scaling = AdapterFolder::open(folder.path()).unwrap().config().scaling();
        assert!((scaling - 6.0 / 2f64.sqrt()).abs() < 1e-12, "{scaling}");
    }
}
