//! PEFT's adapter folder, in and out: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};
use vora_files::write_bytes;
use vora_torch::safetensors::{Checkpoint, save};
use vora_torch::weights::Weights;

use crate::attach::{Visit, attach_all};
use crate::config::names;
use crate::linear::MAGNITUDE;
use crate::pattern::{layer_number, matches_end, matches_whole};
use crate::{LoraConfig, Rank};

/// What PEFT puts before every tensor's name in the base model.
const PREFIX: &str = "base_model.model.";
const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The keys of `adapter_config.json` that say what the tensors mean.
#[derive(Debug, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    r: i64,
    lora_alpha: f64,
    #[serde(default)]
    target_modules: Option<Modules>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    exclude_modules: Option<Modules>,
    #[serde(default)]
    layers_to_transform: Option<OneOrMany<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layers_pattern: Option<OneOrMany<String>>,
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
    rank_pattern: Patterns<i64>,
    #[serde(default)]
    alpha_pattern: Patterns<f64>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

fn none() -> String {
    "none".to_owned()
}

/// Keys that other adapters than plain ones have too, or that say how training began or where it ran: they change
/// nothing about what is computed.
const HARMLESS: [&str; 12] = [
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "init_lora_weights", // see `REWRITES_BASE`
    "lora_ga_config",
    "loftq_config",
    "corda_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
];

/// Beginnings of `init_lora_weights` that take the adapter's start out of the base's weights: the base alone is then
/// not what was trained on.
const REWRITES_BASE: [&str; 6] = ["pissa", "olora", "corda", "loftq", "lora_ga", "mica"];

/// Names of modules, or one regular expression for whole paths; `all-linear` is neither.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Modules {
    Expression(String),
    Names(Vec<String>),
}

impl Modules {
    fn contains(&self, path: &str) -> Result<bool> {
        Ok(match self {
            Self::Expression(word) if word.eq_ignore_ascii_case("all-linear") => true,
            Self::Expression(expression) => matches_whole(expression, path)?,
            Self::Names(list) => list.iter().any(|name| names(name, path)),
        })
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// `rank_pattern` or `alpha_pattern` in the order of the file: the first pattern that matches is PEFT's choice. It
/// writes them sorted, so what it reads may not be the order that it trained with; a rank then fits no tensor.
#[derive(Debug)]
struct Patterns<T>(Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Copy> Patterns<T> {
    fn get(&self, path: &str) -> Result<Option<T>> {
        for (pattern, value) in &self.0 {
            if matches_end(pattern, path)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}

impl<T: Serialize> Serialize for Patterns<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(pattern, value)| (pattern, value)))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Patterns<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of patterns and numbers")
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Patterns::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut patterns = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    patterns.push(entry);
                }
                Ok(Patterns(patterns))
            }
        }

        deserializer.deserialize_any(InOrder(std::marker::PhantomData))
    }
}

/// An adapter folder: what PEFT's `save_pretrained` or [`save_adapter`] wrote.
#[derive(Debug)]
pub struct AdapterFolder {
    path: PathBuf,
    config: LoraConfig,
    modules: Vec<String>, // that carry an adapter, by their paths in the base model
    base_model: Option<String>,
}

impl AdapterFolder {
    /// Reads the configuration and the tensors' shapes.
    ///
    /// PEFT's rules for targets, layers and patterns are applied to the modules that have tensors in the file; what
    /// [`AdapterFolder::config`] says of each of them is what PEFT would do. Errors name the file and the key or tensor:
    /// not LoRA, a variant other than DoRA, a tensor of a module that the configuration leaves out or of another rank
    /// than it says.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let peft: PeftConfig =
            serde_json::from_slice(&text).with_context(|| format!("{} is not a LoRA's", path.display()))?;
        let in_file = || format!("in {}", path.display());
        peft.refuse_variants().with_context(in_file)?;
        let (file, pickle) = (folder.join(TENSORS), folder.join("adapter_model.bin"));
        let tensors = Checkpoint::open(if pickle.exists() && !file.exists() { &pickle } else { &file })?;
        let modules = modules(&tensors).with_context(|| format!("in {}", file.display()))?;
        let mut ranks = BTreeMap::new();
        for module in &modules {
            peft.targets(module).with_context(in_file)?;
            let rank = peft.rank(module).with_context(in_file)?;
            for (half, dim) in [("lora_A", 0), ("lora_B", 1)] {
                let name = format!("{PREFIX}{module}.{half}.weight");
                let (_, shape) =
                    tensors.info(&name).with_context(|| format!("{} has no tensor `{name}`", file.display()))?;
                ensure!(
                    shape.len() == 2 && shape[dim] == rank.r,
                    "{}: tensor `{name}` is {shape:?}, but r is {} in {CONFIG}",
                    file.display(),
                    rank.r
                );
            }
            let magnitude = format!("{PREFIX}{module}.{MAGNITUDE}");
            let has = tensors.info(&magnitude).is_some();
            ensure!(
                has == peft.use_dora,
                "{} has {} tensor `{magnitude}`, but `use_dora` is {} in {CONFIG}",
                file.display(),
                if has { "a" } else { "no" },
                peft.use_dora
            );
            ranks.insert(module.clone(), rank);
        }
        let config = peft.lora_config(&ranks);
        config.validate().with_context(in_file)?;
        Ok(Self { path: folder.to_owned(), config, modules, base_model: peft.base_model_name_or_path })
    }

    /// What the adapter adapts. Where PEFT's file has other layers than the first ones, an expression or exclusions,
    /// the targets are the whole paths of the modules that these come to; so are the patterns always.
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
        for module in &self.modules {
            let (wanted, found) = (wanted.rank(module)?, found.rank(module)?);
            ensure!(
                wanted.r == found.r && (wanted.scaling - found.scaling).abs() < 1e-9,
                "lora gives {module} rank {} and scaling {}, the adapter in {at} rank {} and scaling {}",
                wanted.r,
                wanted.scaling,
                found.r,
                found.scaling
            );
        }
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
        weights.finish_allowing(|name| !is_part(name)).with_context(doing)?;
        Ok(attached)
    }
}

impl PeftConfig {
    /// An error that names what is more than plain LoRA or DoRA.
    fn refuse_variants(&self) -> Result<()> {
        ensure!(self.peft_type == "LORA", "`peft_type` is `{}`, expected `LORA`", self.peft_type);
        ensure!(self.bias == "none", "`bias` is `{}`, expected `none`", self.bias);
        ensure!(self.target_modules.is_some(), "`target_modules` is missing, expected names or an expression");
        let init = self.others.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        ensure!(
            !REWRITES_BASE.iter().any(|known| init.to_lowercase().starts_with(known)),
            "`init_lora_weights` is `{init}`, whose adapter fits a base that was changed as well: convert it to a plain \
             one first (PEFT's path_initial_model_for_weight_conversion)"
        );
        for (key, value) in self.others.iter().filter(|(key, _)| !HARMLESS.contains(&key.as_str())) {
            let set = match value {
                Value::Bool(set) => *set,
                Value::String(text) => !text.is_empty(),
                Value::Array(list) => !list.is_empty(),
                Value::Object(map) => !map.is_empty(),
                Value::Null | Value::Number(_) => false,
            };
            ensure!(!set, "`{key}` is {value}: only plain LoRA and DoRA can be read");
        }
        Ok(())
    }

    /// An error where PEFT would leave the module at `path` without an adapter (its `check_target_module_exists`).
    fn targets(&self, path: &str) -> Result<()> {
        let left_out = |key: &str| format!("`{path}` has an adapter in {TENSORS}, but `{key}` leaves it out");
        if let Some(exclude) = &self.exclude_modules {
            ensure!(!exclude.contains(path).context("`exclude_modules`")?, left_out("exclude_modules"));
        }
        let target = self.target_modules.as_ref().context("`target_modules` is missing")?;
        ensure!(target.contains(path).context("`target_modules`")?, left_out("target_modules"));
        let layers = self.layers_to_transform.as_ref().map_or(&[][..], OneOrMany::as_slice);
        if !layers.is_empty() {
            let layer = self.layer_of(path).context("`layers_pattern`")?;
            ensure!(layer.is_some_and(|layer| layers.contains(&layer)), left_out("layers_to_transform"));
        }
        Ok(())
    }

    /// The number of the layer that `path` lies in.
    fn layer_of(&self, path: &str) -> Result<Option<i64>> {
        let patterns = self.layers_pattern.as_ref().map_or(&[][..], OneOrMany::as_slice);
        let patterns: Vec<Option<&str>> = match patterns {
            [] => vec![None],
            patterns => patterns.iter().map(|pattern| Some(pattern.as_str()).filter(|p| !p.is_empty())).collect(),
        };
        for pattern in patterns {
            if let Some(found) = layer_number(pattern)?.captures(path)? {
                return Ok(found.name("idx").and_then(|idx| idx.as_str().parse().ok()));
            }
        }
        Ok(None)
    }

    fn rank(&self, path: &str) -> Result<Rank> {
        let r = self.rank_pattern.get(path).context("`rank_pattern`")?.unwrap_or(self.r);
        ensure!(r >= 1, "lora.r is {r} for {path}, it must be at least 1");
        let lora_alpha = self.alpha_pattern.get(path).context("`alpha_pattern`")?.unwrap_or(self.lora_alpha);
        Ok(Rank::new(r, Some(lora_alpha), self.use_rslora))
    }

    /// The same in our words; `ranks` are those of all modules that have an adapter.
    fn lora_config(&self, ranks: &BTreeMap<String, Rank>) -> LoraConfig {
        let last = ranks.keys().filter_map(|path| path.split('.').find_map(|part| part.parse::<i64>().ok())).max();
        let listed = self.layers_to_transform.as_ref().map_or(&[][..], OneOrMany::as_slice);
        let first = listed.iter().copied().eq(0..listed.len() as i64); // none listed: all of them
        let layers = if first && !listed.is_empty() { listed.len() as i64 } else { last.map_or(1, |last| last + 1) };
        let target_modules = match &self.target_modules {
            Some(Modules::Names(names)) if first && self.exclude_modules.is_none() => names.clone(),
            _ => ranks.keys().cloned().collect(),
        };
        let (rank_pattern, alpha_pattern) = patterns(ranks, self.r, self.lora_alpha);
        // Where alpha is the rank of every module, it says nothing.
        let plain = rank_pattern.is_empty() && alpha_pattern.is_empty() && !self.use_rslora;
        let lora_alpha = Some(self.lora_alpha).filter(|&alpha| !(plain && alpha == self.r as f64));
        LoraConfig {
            layers,
            r: self.r,
            lora_alpha,
            target_modules,
            rank_pattern,
            alpha_pattern,
            use_rslora: self.use_rslora,
        }
    }
}

/// The modules whose rank or alpha is not the common one, by their whole paths.
fn patterns(ranks: &BTreeMap<String, Rank>, r: i64, lora_alpha: f64) -> (BTreeMap<String, i64>, BTreeMap<String, f64>) {
    let other_r = ranks.iter().filter(|(_, rank)| rank.r != r).map(|(path, rank)| (path.clone(), rank.r));
    let other_alpha = ranks.iter().filter(|(_, rank)| rank.lora_alpha != lora_alpha);
    (other_r.collect(), other_alpha.map(|(path, rank)| (path.clone(), rank.lora_alpha)).collect())
}

/// The module whose adapter the tensor `name` is a part of.
fn module_of(name: &str) -> Option<&str> {
    let parts = [".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"];
    parts.iter().find_map(|part| name.strip_suffix(part))
}

fn is_part(name: &str) -> bool {
    module_of(name).is_some()
}

/// The paths of all modules that have an adapter.
fn modules(tensors: &Checkpoint) -> Result<Vec<String>> {
    let mut modules = BTreeSet::new();
    for name in tensors.names() {
        let Some(in_base) = name.strip_prefix(PREFIX) else {
            bail!("tensor `{name}` does not begin with `{PREFIX}`");
        };
        match module_of(in_base) {
            Some(module) => drop(modules.insert(module.to_owned())),
            None => ensure!(!in_base.contains(".lora_"), "tensor `{name}` is no part of a linear layer's LoRA or DoRA"),
        }
    }
    ensure!(!modules.is_empty(), "there is no adapter: no tensor ends with .lora_A.weight");
    Ok(modules.into_iter().collect())
}

/// Writes an adapter folder that PEFT's `from_pretrained` reads; each file is written beside its place and renamed.
///
/// `tensors` go by their names in the base model: `<path>.lora_A.weight`, `<path>.lora_B.weight`, DoRA's
/// `<path>.lora_magnitude_vector`, and modules saved whole. `base_model` is where PEFT finds the base: a hub name or a
/// folder. An error names a tensor whose rank is not the one that `config` gives its module.
pub fn save_adapter(folder: &Path, config: &LoraConfig, base_model: &str, tensors: &[(String, Tensor)]) -> Result<()> {
    config.validate()?;
    let mut whole: BTreeSet<&str> = BTreeSet::new();
    let mut ranks = BTreeMap::new();
    for (name, tensor) in tensors {
        match module_of(name) {
            Some(module) => {
                let rank = config.rank(module)?;
                let (found, is_a) = (tensor.size(), name.ends_with("lora_A.weight"));
                ensure!(!is_a || found[0] == rank.r, "tensor `{name}` is {found:?}, but lora.r is {} for it", rank.r);
                ranks.insert(module.to_owned(), rank);
            }
            None => {
                let (module, _) =
                    name.rsplit_once('.').with_context(|| format!("tensor `{name}` belongs to no module"))?;
                whole.insert(module);
            }
        }
    }
    let modules_to_save: Vec<String> = whole.into_iter().map(str::to_owned).collect();
    let common = Rank::new(config.r, config.lora_alpha, config.use_rslora);
    let (rank_pattern, alpha_pattern) = patterns(&ranks, common.r, common.lora_alpha);
    let peft = PeftConfig {
        peft_type: "LORA".to_owned(),
        task_type: Some("CAUSAL_LM".to_owned()),
        base_model_name_or_path: Some(base_model.to_owned()),
        r: common.r,
        lora_alpha: common.lora_alpha,
        target_modules: Some(Modules::Names(config.target_modules.clone())),
        exclude_modules: None,
        layers_to_transform: Some(OneOrMany::Many((0..config.layers).collect())),
        layers_pattern: None,
        modules_to_save: (!modules_to_save.is_empty()).then_some(modules_to_save),
        bias: none(),
        lora_dropout: 0.0,
        inference_mode: true,
        use_rslora: config.use_rslora,
        use_dora: tensors.iter().any(|(name, _)| name.ends_with(MAGNITUDE)),
        rank_pattern: Patterns(rank_pattern.into_iter().collect()),
        alpha_pattern: Patterns(alpha_pattern.into_iter().collect()),
        others: Map::new(),
    };
    for (module, rank) in &ranks {
        // What PEFT will make of it: it looks for the layer's number behind a name and a dot, and for patterns in order.
        peft.targets(module)?;
        let found = peft.rank(module)?;
        ensure!(found == *rank, "the patterns of {module} would be read as {found:?}, not as {rank:?}");
    }
    let tensors: Vec<(String, Tensor)> =
        tensors.iter().map(|(name, t)| (format!("{PREFIX}{name}"), t.shallow_clone())).collect();
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    save(&folder.join(TENSORS), &tensors, &[])?;
    let json = serde_json::to_vec_pretty(&peft)?;
    write_bytes(&folder.join(CONFIG), &json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Linear;
    use fixtures::{Golden, assert_close, assert_close_to};
    use tch::nn::Module;
    use vora_torch::weights::Init;

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
        let name = |half| format!("model.layers.0.mlp.up_proj.{half}.weight");
        let tensors = [(name("lora_A"), t([3, 4])), (name("lora_B"), t([5, 3]))];
        save_adapter(folder.path(), &config, "base", &tensors).unwrap();
        let text = fs::read_to_string(folder.path().join(CONFIG)).unwrap();
        assert!(text.contains(r#""lora_alpha": 3.0"#), "{text}");
        assert_eq!(AdapterFolder::open(folder.path()).unwrap().config(), &config);
        // What PEFT would leave out or read otherwise is not written.
        let rest = |name: &str| format!("{name}.lora_A.weight");
        for (name, r, says) in [
            ("layers.0.mlp.up_proj", 3, "`layers.0.mlp.up_proj` has an adapter in"),
            ("model.layers.1.mlp.up_proj", 3, "`layers_to_transform` leaves it out"),
            ("model.layers.0.mlp.xy_proj", 3, "`target_modules` leaves it out"),
            ("model.layers.0.mlp.up_proj", 2, "lora_A.weight` is [2, 4], but lora.r is 3"),
        ] {
            let error = save_adapter(folder.path(), &config, "base", &[(rest(name), t([r, 4]))]).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
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
                layer.iter_mut().try_for_each(|(module, linear)| visit(layer_idx, module, linear))
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
            let mut take = |layer_idx: usize, module: &str, linear: &mut Linear| {
                for adapter in linear.adapters() {
                    let path = format!("model.layers.{layer_idx}.{module}");
                    tensors.push((format!("{path}.lora_A.weight"), adapter.lora_a().shallow_clone()));
                    tensors.push((format!("{path}.lora_B.weight"), adapter.lora_b().shallow_clone()));
                    let magnitude = adapter.magnitude().map(Tensor::shallow_clone);
                    tensors.extend(magnitude.map(|magnitude| (format!("{path}.{MAGNITUDE}"), magnitude)));
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
                let attached = folder.attach("x", "model.layers", Device::Cpu, |visit| stack.visit(visit)).unwrap();
                assert_eq!(attached, adapters, "{case}");
                assert_close_to(&stack.forward(&golden["x"]), y, 1e-5);
                if !rewritten {
                    save_adapter(written.path(), folder.config(), "base", &stack.adapters()).unwrap();
                    AdapterFolder::open(written.path()).unwrap().expect(folder.config()).unwrap();
                }
                for (layer_idx, layer) in stack.0.iter_mut().enumerate() {
                    for (module, linear) in layer {
                        linear.merge();
                        let merged = format!("{case}.merged.model.layers.{layer_idx}.{module}.weight");
                        assert_close_to(linear.weight(), &golden[merged.as_str()], 1e-6);
                    }
                }
                assert_close_to(&stack.forward(&golden["x"]), y, 1e-5);
            }
            let theirs = fixtures::root().join("golden/peft_folders").join(case);
            let folder = AdapterFolder::open(&theirs).unwrap();
            let base = golden.under("weights.").into_iter();
            let adapter = Tensor::read_safetensors(theirs.join(TENSORS)).unwrap().into_iter();
            let adapter = adapter.map(|(name, t)| (name.strip_prefix(PREFIX).unwrap().to_owned(), t));
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
        folder.attach("x", "model.layers", Device::Cpu, |visit| stack.visit(visit)).unwrap();
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
        let json = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
        let cases = [
            ("peft_type", "IA3".into(), "`peft_type` is `IA3`, expected `LORA`"),
            ("bias", "all".into(), "`bias` is `all`"),
            ("lora_bias", true.into(), "`lora_bias` is true"),
            ("fan_in_fan_out", true.into(), "`fan_in_fan_out` is true"),
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
        assert!(AdapterFolder::open(folder.path()).unwrap().config().use_rslora);
        let scaling = AdapterFolder::open(folder.path()).unwrap().config().scaling();
        assert!((scaling - 6.0 / 2f64.sqrt()).abs() < 1e-12, "{scaling}");
    }
}
