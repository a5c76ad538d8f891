//! PEFT's `adapter_config.json`: its keys, and PEFT's rules for which module gets which rank.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use crate::acts_on::ActsOn;
use crate::config::{ALL_LAYERS, LoraConfig, Rank, in_layer, names};
use crate::pattern::{layer_number, matches_end, matches_whole};

/// What PEFT puts before every tensor's name in the base model.
pub const PEFT_PREFIX: &str = "base_model.model.";

/// PEFT's file of an adapter's tensors.
pub const ADAPTER_TENSORS: &str = "adapter_model.safetensors";

/// PEFT's file of an adapter's configuration.
pub(super) const CONFIG: &str = "adapter_config.json";

/// The model that an adapter is for, as PEFT finds it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BaseModel<'a> {
    /// `base_model_name_or_path`: a name of the hub, or a folder.
    pub name_or_path: &'a str,
    /// `task_type`: which of PEFT's and transformers' classes the model is opened by, if one.
    pub task_type: Option<&'a str>,
}

impl<'a> BaseModel<'a> {
    /// A model of no class that PEFT knows.
    pub fn new(name_or_path: &'a str) -> Self {
        Self { name_or_path, task_type: None }
    }

    /// A language model: `AutoPeftModelForCausalLM` opens it.
    pub fn causal_lm(name_or_path: &'a str) -> Self {
        Self { task_type: Some("CAUSAL_LM"), ..Self::new(name_or_path) }
    }
}

/// The keys of `adapter_config.json` that say what the tensors mean.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct PeftConfig {
    peft_type: String,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    pub(super) base_model_name_or_path: Option<String>,
    pub(super) r: i64,
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
    pub(super) modules_to_save: Option<Vec<String>>,
    #[serde(default = "none")]
    pub(super) bias: String,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    pub(super) use_dora: bool,
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
const HARMLESS: [&str; 13] = [
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out", // of `Conv1D`, which no model here has; at a linear PEFT sets it to false (`dispatch_default`)
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

impl PeftConfig {
    /// The file of an adapter of ours whose modules have these ranks.
    ///
    /// # Errors
    /// Where PEFT would read something else out of it.
    pub(super) fn new(
        config: &LoraConfig,
        ranks: &BTreeMap<String, Rank>,
        base_model: BaseModel<'_>,
        modules_to_save: Vec<String>,
        use_dora: bool,
    ) -> Result<Self> {
        let common = Rank::new(config.r, config.lora_alpha, config.use_rslora);
        let (rank_pattern, alpha_pattern) = patterns(ranks, common.r, common.lora_alpha);
        let is_everywhere = config.layers == ALL_LAYERS;
        let mut peft = Self {
            peft_type: "LORA".to_owned(),
            task_type: base_model.task_type.map(str::to_owned),
            base_model_name_or_path: Some(base_model.name_or_path.to_owned()),
            r: common.r,
            lora_alpha: common.lora_alpha,
            target_modules: Some(Modules::Names(config.target_modules.clone())),
            exclude_modules: None,
            layers_to_transform: (!is_everywhere).then(|| OneOrMany::Many((0..config.layers).collect())),
            layers_pattern: None,
            modules_to_save: (!modules_to_save.is_empty()).then_some(modules_to_save),
            bias: none(),
            lora_dropout: 0.0,
            inference_mode: true,
            use_rslora: config.use_rslora,
            use_dora,
            rank_pattern: Patterns(rank_pattern.into_iter().collect()),
            alpha_pattern: Patterns(alpha_pattern.into_iter().collect()),
            others: Map::new(),
        };
        for module in ranks.keys() {
            ensure!(config.targets(module), left_out(module, "target_modules"));
            ensure!(config.reaches(module), left_out(module, "layers_to_transform"));
        }
        // PEFT looks for a layer's number behind two names: where it would find none, every module is named whole.
        if ranks.keys().any(|module| peft.targets(module).is_err()) {
            peft.target_modules = Some(Modules::Names(ranks.keys().cloned().collect()));
            peft.layers_to_transform = None;
        }
        for (module, rank) in ranks {
            // What PEFT will make of it: it goes through patterns in order.
            let found = peft.rank(module)?;
            ensure!(found == *rank, "the patterns of {module} would be read as {found:?}, not as {rank:?}");
        }
        Ok(peft)
    }

    /// An error that names what is more than plain LoRA or DoRA.
    pub(super) fn refuse_variants(&self) -> Result<()> {
        ensure!(self.peft_type == "LORA", "`peft_type` is `{}`, expected `LORA`", self.peft_type);
        let known = ["none", "all", "lora_only"].contains(&self.bias.as_str());
        ensure!(known, "`bias` is `{}`, expected `none`, `all` or `lora_only`", self.bias);
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
    pub(super) fn targets(&self, path: &str) -> Result<()> {
        if let Some(exclude) = &self.exclude_modules {
            ensure!(!exclude.contains(path).context("`exclude_modules`")?, left_out(path, "exclude_modules"));
        }
        let target = self.target_modules.as_ref().context("`target_modules` is missing")?;
        // A head that is tied to an adapted embedding gets an adapter of its own, though nobody named it.
        let ties = self.others.get("ensure_weight_tying").and_then(Value::as_bool) == Some(true);
        if let (true, Some(before)) = (ties, path.strip_suffix("lm_head"))
            && target.contains(&format!("{before}model.embed_tokens"))?
        {
            return Ok(());
        }
        ensure!(target.contains(path).context("`target_modules`")?, left_out(path, "target_modules"));
        let layers = self.layers_to_transform.as_ref().map_or(&[][..], OneOrMany::as_slice);
        // A module that is named by its whole path lies in no layer that is asked about.
        if !layers.is_empty() && !target.has(path) {
            let layer = self.layer_of(path).context("`layers_pattern`")?;
            ensure!(layer.is_some_and(|layer| layers.contains(&layer)), left_out(path, "layers_to_transform"));
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

    pub(super) fn rank(&self, path: &str) -> Result<Rank> {
        let r = self.rank_pattern.get(path).context("`rank_pattern`")?.unwrap_or(self.r);
        ensure!(r >= 1, "lora.r is {r} for {path}, it must be at least 1");
        let lora_alpha = self.alpha_pattern.get(path).context("`alpha_pattern`")?.unwrap_or(self.lora_alpha);
        Ok(Rank::new(r, Some(lora_alpha), self.use_rslora))
    }

    /// The same in our words; `ranks` are those of all modules that have an adapter.
    pub(super) fn lora_config(&self, ranks: &BTreeMap<String, Rank>) -> LoraConfig {
        // None where a module lies in no layer.
        let last = ranks
            .keys()
            .map(|path| in_layer(path).0)
            .collect::<Option<Vec<i64>>>()
            .and_then(|all| all.into_iter().max());
        let listed = self.layers_to_transform.as_ref().map_or(&[][..], OneOrMany::as_slice);
        let first = listed.iter().copied().eq(0..listed.len() as i64); // none listed: all of them
        let layers =
            if first && !listed.is_empty() { listed.len() as i64 } else { last.map_or(ALL_LAYERS, |last| last + 1) };
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
            acts_on: ActsOn::All,
            answers_on: None,
        }
    }
}

/// A module that has an adapter where the configuration has none.
fn left_out(path: &str, key: &str) -> String {
    format!("`{path}` has an adapter in {ADAPTER_TENSORS}, but `{key}` leaves it out")
}

/// The modules whose rank or alpha is not the common one, by their whole paths.
fn patterns(ranks: &BTreeMap<String, Rank>, r: i64, lora_alpha: f64) -> (BTreeMap<String, i64>, BTreeMap<String, f64>) {
    let other_r = ranks.iter().filter(|(_, rank)| rank.r != r).map(|(path, rank)| (path.clone(), rank.r));
    let other_alpha = ranks.iter().filter(|(_, rank)| rank.lora_alpha != lora_alpha);
    (other_r.collect(), other_alpha.map(|(path, rank)| (path.clone(), rank.lora_alpha)).collect())
}

/// Names of modules, or one regular expression for whole paths; `all-linear` is neither.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected names of modules, or an expression")]
enum Modules {
    Expression(String),
    Names(Vec<String>),
}

impl Modules {
    /// Whether `path` is one of the names.
    fn has(&self, path: &str) -> bool {
        matches!(self, Self::Names(list) if list.iter().any(|name| name == path))
    }

    fn contains(&self, path: &str) -> Result<bool> {
        Ok(match self {
            Self::Expression(word) if word.eq_ignore_ascii_case("all-linear") => true,
            Self::Expression(expression) => matches_whole(expression, path)?,
            Self::Names(list) => list.iter().any(|name| names(name, path)),
        })
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected one value, or a list of them")]
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
