//! PEFT's adapter folder, in and out: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use vora_files::write_bytes;
use vora_torch::checkpoint::{Checkpoint, save};
use vora_torch::weights::Weights;

use super::config::{ADAPTER_TENSORS, BaseModel, CONFIG, PEFT_PREFIX, PeftConfig};
use crate::adapter::{EMBEDDING_HALVES, LINEAR_HALVES, MAGNITUDE, adapted_module};
use crate::attach::{Visit, attach_all};
use crate::config::{ALL_LAYERS, LoraConfig};

/// Why an adapter is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// It is of another configuration than the one asked for.
    #[error("{message}")]
    OtherConfig {
        /// The first key in which they differ.
        key: &'static str,
        /// The key with both values, and the folder.
        message: String,
    },
}

/// An adapter folder: what PEFT's `save_pretrained` or [`save_adapter`] wrote.
#[derive(Debug)]
pub struct AdapterFolder {
    path: PathBuf,
    config: LoraConfig,
    modules: Vec<String>,     // that carry an adapter, by their paths in the base model
    embeddings: Vec<String>,  // those of them that are embeddings
    saved_whole: Vec<String>, // modules that were trained themselves, by theirs
    is_dora: bool,
    bias: String, // which biases were trained as well
    base_model: Option<String>,
}

impl AdapterFolder {
    /// Reads the configuration and the tensors' shapes.
    ///
    /// PEFT's rules for targets, layers and patterns are applied to the modules that have tensors in the file; what
    /// [`AdapterFolder::config`] says of each of them is what PEFT would do.
    ///
    /// # Errors
    /// Names the file and the key or tensor: not LoRA, a variant other than DoRA, a tensor of a module that the configuration leaves out or of another rank
    /// than it says, a module that `modules_to_save` lists without a tensor of it.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG);
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let peft: PeftConfig = serde_json::from_slice(&text)
            .map_err(Into::into)
            .and_then(|json| vora_files::object(&json))
            .with_context(|| format!("{} is not a LoRA's", path.display()))?;
        let in_file = || format!("in {}", path.display());
        peft.refuse_variants().with_context(in_file)?;
        let (file, pickle) = (folder.join(ADAPTER_TENSORS), folder.join("adapter_model.bin"));
        let tensors = Checkpoint::open(if pickle.exists() && !file.exists() { &pickle } else { &file })?;
        let modules = modules(&tensors).with_context(|| format!("in {}", file.display()))?;
        let (mut ranks, mut embeddings) = (BTreeMap::new(), Vec::new());
        for module in &modules {
            peft.targets(module).with_context(in_file)?;
            let rank = peft.rank(module).with_context(in_file)?;
            let has = |half: &str| tensors.info(&format!("{PEFT_PREFIX}{module}.{half}")).is_some();
            let is_embedding = EMBEDDING_HALVES.into_iter().any(has);
            if is_embedding {
                embeddings.push(module.clone());
            }
            let halves = if is_embedding { EMBEDDING_HALVES } else { LINEAR_HALVES };
            for (dim, half) in halves.into_iter().enumerate() {
                let name = format!("{PEFT_PREFIX}{module}.{half}");
                let (_, shape) =
                    tensors.info(&name).with_context(|| format!("{} has no tensor `{name}`", file.display()))?;
                ensure!(
                    shape.len() == 2 && shape[dim] == rank.r,
                    "{}: tensor `{name}` is {shape:?}, but r is {} in {CONFIG}",
                    file.display(),
                    rank.r
                );
            }
            let magnitude = format!("{PEFT_PREFIX}{module}.{MAGNITUDE}");
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
        let whole = tensors.names().filter_map(|name| name.strip_prefix(PEFT_PREFIX));
        let saved_whole: Vec<String> = whole.filter(|name| adapted_module(name).is_none()).map(str::to_owned).collect();
        for module in peft.modules_to_save.iter().flatten() {
            ensure!(
                saved_whole.iter().any(|name| is_within(name, module)),
                "`modules_to_save` of {} lists `{module}`, which was trained as a whole, but {} has no tensor of it: save the \
                 adapter again with it, or take it from the list if the base has no such module",
                path.display(),
                file.display()
            );
        }
        let (bias, base_model, is_dora) = (peft.bias, peft.base_model_name_or_path, peft.use_dora);
        Ok(Self { path: folder.to_owned(), config, modules, embeddings, saved_whole, is_dora, bias, base_model })
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

    /// An error where it has more than linears can carry; `vora convert` merges that as well.
    fn linears_only(&self) -> Result<()> {
        let at = self.path.display();
        if let Some(embedding) = self.embeddings.first() {
            bail!(
                "the adapter in {at} has LoRA on the embedding {embedding}, which can only be merged: `vora convert` does"
            )
        }
        let bias = &self.bias;
        ensure!(
            bias == "none",
            "the adapter in {at} has trained biases (`bias` is `{bias}`), which can only be merged: `vora convert` does"
        );
        Ok(())
    }

    /// Checks that it is `B A` on linear layers and nothing else, so that it can act on some rows of a batch while others
    /// have another one.
    ///
    /// # Errors
    /// Names what else it is: DoRA, modules that were trained themselves, LoRA on an embedding, trained biases.
    pub fn low_rank_alone(&self) -> Result<()> {
        let at = self.path.display();
        ensure!(
            !self.is_dora,
            "the adapter in {at} is a DoRA (`use_dora`), which scales the rows of the weights themselves: `vora convert` merges it"
        );
        if let Some(name) = self.saved_whole.first() {
            bail!(
                "the adapter in {at} has weights of the model's own (`modules_to_save`), as `{name}`, which all requests would \
                 share: `vora convert` merges it"
            )
        }
        self.linears_only()
    }

    /// The modules that carry an adapter, by their paths in the base model.
    pub fn modules(&self) -> &[String] {
        &self.modules
    }

    /// Compares the adapter with what `config` asks for.
    ///
    /// # Errors
    /// [`AdapterError::OtherConfig`], which names the first key in which they differ, with both values; and where it
    /// adapts an embedding or has trained biases, which no `config` asks for.
    pub fn expect(&self, config: &LoraConfig) -> Result<()> {
        self.linears_only()?;
        let at = self.path.display();
        let (found, wanted) = (&self.config, config);
        let same = |is_same: bool, key: &'static str, message: &dyn Fn() -> String| {
            if is_same { Ok(()) } else { Err(AdapterError::OtherConfig { key, message: message() }) }
        };
        let (r, has) = (wanted.r, found.r);
        same(has == r, "lora.r", &|| format!("lora.r is {r}, the adapter in {at} has {has}"))?;
        let (layers, has) = (wanted.layers, found.layers);
        same(has == layers || layers == ALL_LAYERS, "lora.layers", &|| {
            format!("lora.layers is {layers}, the adapter in {at} has {has}")
        })?;
        let (scaling, has) = (wanted.scaling(), found.scaling());
        same((has - scaling).abs() < 1e-9, "lora.lora_alpha", &|| {
            format!("the scaling of lora is {scaling}, that of the adapter in {at} is {has}")
        })?;
        let sorted = |config: &LoraConfig| {
            let mut targets = config.target_modules.clone();
            targets.sort();
            targets
        };
        let (targets, has) = (sorted(wanted), sorted(found));
        same(has == targets, "lora.target_modules", &|| {
            format!("lora.target_modules is {targets:?}, the adapter in {at} has {has:?}")
        })?;
        for module in &self.modules {
            let (wanted, found) = (wanted.rank(module)?, found.rank(module)?);
            same(wanted.r == found.r && (wanted.scaling - found.scaling).abs() < 1e-9, "lora.rank_pattern", &|| {
                format!(
                    "lora gives {module} rank {} and scaling {}, the adapter in {at} rank {} and scaling {}",
                    wanted.r, wanted.scaling, found.r, found.scaling
                )
            })?;
        }
        Ok(())
    }

    /// Its tensors by their names in the base model, adapters and modules saved whole alike.
    ///
    /// # Errors
    /// See [`Weights::open`].
    pub fn weights(&self, device: Device, kind: Kind) -> Result<Weights> {
        Ok(Weights::open(&self.path.join(ADAPTER_TENSORS), device, kind)?.pp(PEFT_PREFIX.trim_end_matches('.')))
    }

    /// Attaches it as `name` to the linears of a model, and says how many those were; see [`attach_all`]. Modules saved whole
    /// are left to the caller, who finds them in [`AdapterFolder::weights`].
    ///
    /// # Errors
    /// Lists what does not fit: an adapter of another model. LoRA on an embedding and trained biases can only be merged.
    pub fn attach(
        &self,
        name: &str,
        device: Device,
        linears: impl FnOnce(&mut Visit<'_>) -> Result<()>,
    ) -> Result<usize> {
        let doing = || match &self.base_model {
            Some(base) => format!("attaching the adapter {}, made for {base}", self.path.display()),
            None => format!("attaching the adapter {}", self.path.display()),
        };
        self.linears_only()?;
        let weights = self.weights(device, Kind::Float)?;
        let attached = attach_all(name, &self.config, &weights, linears).with_context(doing)?;
        weights.finish_allowing(|name| adapted_module(name).is_none()).with_context(doing)?;
        Ok(attached)
    }
}

/// Whether a tensor lies in a module that `modules_to_save` calls so: PEFT compares the ends of paths. What its wrapper keeps of
/// the base is no part of it.
fn is_within(tensor: &str, module: &str) -> bool {
    let ends = tensor.match_indices('.').map(|(end, _)| &tensor[..end]);
    !tensor.contains(".original_module.") && ends.into_iter().any(|path| path.ends_with(module))
}

/// The paths of all modules that have an adapter.
fn modules(tensors: &Checkpoint) -> Result<Vec<String>> {
    let mut modules = BTreeSet::new();
    for name in tensors.names() {
        let Some(in_base) = name.strip_prefix(PEFT_PREFIX) else {
            bail!("tensor `{name}` does not begin with `{PEFT_PREFIX}`");
        };
        match adapted_module(in_base) {
            Some(module) => drop(modules.insert(module.to_owned())),
            None => {
                ensure!(!in_base.contains(".lora_"), "tensor `{name}` is no part of a LoRA or DoRA that is known here")
            }
        }
    }
    ensure!(!modules.is_empty(), "there is no adapter: no tensor ends with .lora_A.weight");
    Ok(modules.into_iter().collect())
}

/// Writes an adapter folder that PEFT's `from_pretrained` reads; each file is written beside its place and renamed.
///
/// `tensors` go by their names in the base model: `<path>.lora_A.weight`, `<path>.lora_B.weight`, DoRA's
/// `<path>.lora_magnitude_vector`, and modules saved whole.
///
/// # Errors
/// Names a tensor whose rank is not the one that `config` gives its module, and a module that PEFT would give another.
pub fn save_adapter(
    folder: &Path,
    config: &LoraConfig,
    base_model: BaseModel<'_>,
    tensors: &[(String, Tensor)],
) -> Result<()> {
    config.validate()?;
    let mut whole: BTreeSet<&str> = BTreeSet::new();
    let mut ranks = BTreeMap::new();
    for (name, tensor) in tensors {
        match adapted_module(name) {
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
    let modules_to_save = whole.into_iter().map(str::to_owned).collect();
    let use_dora = tensors.iter().any(|(name, _)| name.ends_with(MAGNITUDE));
    let peft = PeftConfig::new(config, &ranks, base_model, modules_to_save, use_dora)?;
    let tensors: Vec<(String, Tensor)> =
        tensors.iter().map(|(name, t)| (format!("{PEFT_PREFIX}{name}"), t.shallow_clone())).collect();
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    save(&folder.join(ADAPTER_TENSORS), &tensors, &[])?;
    let json = serde_json::to_vec_pretty(&peft)?;
    write_bytes(&folder.join(CONFIG), &json)
}
