//! The checkpoint to convert: its layout, its tensors under common names, and what its config says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use vora_llm::MODEL_TYPES;
use vora_lora::{ADAPTER_TENSORS, AdapterFolder, LoraConfig, PEFT_PREFIX};
use vora_torch::checkpoint::Checkpoint;
use vora_vision::EncoderConfig;

use super::layout::Layout;
use crate::named;
use crate::trained::VISION;
use crate::vora::VoraConfig;

/// What stands before the decoder's names in a VoRA's folder.
pub(super) const LLM_PREFIX: &str = "llm.";

/// LLaVA's names: those of the published checkpoints, and those of its modules in transformers 5.
pub(super) const LLAVA: [(&str, &str); 4] = [
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
];

/// A tensor of one of the source's checkpoints.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) checkpoint: usize,
    /// Its name in the file.
    pub(super) stored: String,
    /// Its name in the whole model: that of a VoRA's folder where the source is the adapter of one, and a LLaVA's published
    /// one where it is the adapter of that.
    pub(super) name: String,
}

/// What is read.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) layout: Layout,
    /// That of the model below an adapter, where there are several.
    pub(super) base_layout: Option<Layout>,
    /// An adapter has three: itself, the vision weights, and its base.
    pub(super) checkpoints: Vec<Checkpoint>,
    pub(super) config: Option<Map<String, Value>>,
    pub(super) vora: Option<VoraConfig>,
    pub(super) lora: Option<LoraConfig>,
}

impl Source {
    /// Opens what lies at `path` and says what it is.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let config = read_object(&path.join("config.json"))?;
        let model_type = config.as_ref().and_then(|config| config.get("model_type")).and_then(Value::as_str);
        let is_vora = model_type == Some("vora");
        let vora = if is_vora { Some(VoraConfig::open(path)?) } else { None };
        if path.join("adapter_config.json").exists() {
            return Self::open_adapter(path, config, vora);
        }
        let checkpoint = Checkpoint::open(path)?;
        ensure!(
            !checkpoint.names().any(|name| name.ends_with(".weight_packed")),
            "weights of {} are in few bits: convert the folder that it was quantized from",
            path.display()
        );
        let layout = match model_type {
            _ if vora_gguf::folder::find(path)?.is_some() => Layout::Gguf,
            Some("vora") if checkpoint.names().any(|name| name.contains(".lora_")) => Layout::VoraUnmerged,
            Some("vora") => Layout::Vora,
            Some("llava") => llava_layout(&checkpoint)?,
            Some(known) if known != "chameleon" && MODEL_TYPES.contains(&known) => Layout::Llm,
            _ => Layout::Safetensors,
        };
        let lora = vora.as_ref().and_then(|vora| vora.lora.clone());
        ensure!(
            lora.is_some() || layout != Layout::VoraUnmerged,
            "{} has adapters beside its weights, but no `lora` in config.json, which says their scaling",
            path.display()
        );
        Ok(Self { path: path.to_owned(), layout, base_layout: None, checkpoints: vec![checkpoint], config, vora, lora })
    }

    fn open_adapter(path: &Path, config: Option<Map<String, Value>>, vora: Option<VoraConfig>) -> Result<Self> {
        let tower = config.as_ref().and_then(|config| config.get("vision_lora")).and_then(Value::as_object);
        ensure!(
            tower.is_none_or(Map::is_empty),
            "{} holds what a LLaVA's run trained, with adapters on the vision tower: `vora merge` folds them in, or with \
             --as base writes the model that PEFT puts them on",
            path.display()
        );
        ensure!(
            vora.is_some() || !path.join(VISION).exists(),
            "{} holds what a run trained beside the adapter ({VISION}), which has no place in what an adapter becomes: `vora merge` it, \
             then convert what that writes",
            path.display()
        );
        let adapter = AdapterFolder::open(path)?;
        let mut checkpoints = vec![Checkpoint::open(&path.join(ADAPTER_TENSORS))?];
        let layout = if let Some(vora) = &vora {
            checkpoints.push(Checkpoint::open(&path.join(VISION))?);
            let lora = vora.lora.as_ref();
            adapter.expect(lora.with_context(|| format!("config.json of {} has no `lora`", path.display()))?)?;
            Layout::Peft
        } else {
            Layout::PeftLlm
        };
        // Which tokens it acts on PEFT's file has no word for; a run's config beside it has.
        let said = config.as_ref().and_then(|config| config.get("lora"));
        let said: Option<LoraConfig> = said.and_then(|lora| serde_json::from_value(lora.clone()).ok());
        let (acts_on, answers_on) = said.map_or_else(Default::default, |lora| (lora.acts_on, lora.answers_on));
        let lora = Some(LoraConfig { acts_on, answers_on, ..adapter.config().clone() });
        Ok(Self { path: path.to_owned(), layout, base_layout: None, checkpoints, config, vora, lora })
    }

    /// Opens the model below an adapter as the last checkpoint.
    pub(super) fn add_base(&mut self, resolve: &dyn Fn(&str) -> Result<PathBuf>) -> Result<()> {
        if !matches!(self.layout, Layout::Peft | Layout::PeftLlm) {
            return Ok(());
        }
        let doing = || format!("the model below the adapter {}", self.path.display());
        let base = match &self.vora {
            Some(_) => named::find(&self.path, "llm", resolve),
            None => {
                let adapter = AdapterFolder::open(&self.path)?;
                named::locate(&self.path, adapter.base_model().unwrap_or_default(), None, resolve)
            }
        };
        let base = base.with_context(doing)?;
        if self.layout == Layout::PeftLlm {
            self.config = vora_gguf::folder::config(&base)?
                .map_or_else(|| read_object(&base.join("config.json")), |c| Ok(Some(c)))?;
        }
        let base = Checkpoint::open(&base).with_context(doing)?;
        if self.layout == Layout::PeftLlm && self.model_type() == Some("llava") {
            self.layout = Layout::PeftLlava;
            self.base_layout = Some(llava_layout(&base)?);
            let tower = tower_config(self.config.as_ref());
            let (published, lora) =
                (published_in(&base, tower.as_ref()), self.lora.as_mut().context("an adapter has a configuration")?);
            let path = |module: String| {
                let weight = published(&format!("{module}.weight"));
                weight.strip_suffix(".weight").unwrap_or(&module).to_owned()
            };
            lora.rank_pattern = std::mem::take(&mut lora.rank_pattern).into_iter().map(|(m, r)| (path(m), r)).collect();
            lora.alpha_pattern =
                std::mem::take(&mut lora.alpha_pattern).into_iter().map(|(m, a)| (path(m), a)).collect();
        }
        self.checkpoints.push(base);
        Ok(())
    }

    fn model_type(&self) -> Option<&str> {
        self.config.as_ref()?.get("model_type")?.as_str()
    }

    /// Whether it is an adapter that other tools than this one made, for a model of theirs.
    pub(super) fn is_foreign_adapter(&self) -> bool {
        matches!(self.layout, Layout::PeftLlm | Layout::PeftLlava)
    }

    /// What stands before the decoder's names in [`Part::name`].
    pub(super) fn llm_prefix(&self) -> &'static str {
        match self.layout {
            Layout::Peft | Layout::Vora | Layout::VoraUnmerged => LLM_PREFIX,
            Layout::PeftLlava => "language_model.",
            _ => "",
        }
    }

    /// The folder that config and tokenizer lie in: the base's, where the adapter of a plain LLM comes without.
    pub(super) fn side_folder(&self) -> Option<&Path> {
        match self.layout {
            Layout::PeftLlm | Layout::PeftLlava => self.checkpoints.last().map(Checkpoint::path),
            _ => Some(&self.path),
        }
    }

    /// The GGUF file or its folder, where config and tokenizer come out of one.
    pub(super) fn gguf(&self) -> Option<&Path> {
        let from_weights = matches!(self.layout, Layout::Gguf | Layout::PeftLlm);
        self.side_folder()
            .filter(|path| from_weights && vora_gguf::folder::find(path).is_ok_and(|found| found.is_some()))
    }

    /// All tensors, those of an adapter before those of its base.
    pub(super) fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        let base = self.checkpoints.last();
        let tower = tower_config(self.config.as_ref());
        let published = base.map(|base| published_in(base, tower.as_ref()));
        // A base that was saved without its head lacks the beginning of its names.
        let is_bare =
            base.is_some_and(|base| base.info("norm.weight").is_some() && base.info("model.norm.weight").is_none());
        for (checkpoint, tensors) in self.checkpoints.iter().enumerate() {
            for stored in tensors.names() {
                // A head or embedding that is adapted lies whole beside its adapter, under the name of PEFT's wrapper; one
                // of another size under that of another wrapper, and under its own.
                let in_base = stored.strip_prefix(PEFT_PREFIX).unwrap_or(stored);
                let in_base = in_base.replace(".base_layer.", ".").replace(".modules_to_save.", ".");
                let name = match self.layout {
                    Layout::Peft if checkpoint != 1 => format!("{LLM_PREFIX}{in_base}"),
                    Layout::PeftLlm if is_bare && checkpoint > 0 && !in_base.starts_with("lm_head.") => {
                        format!("model.{in_base}")
                    }
                    Layout::PeftLlm => in_base,
                    Layout::PeftLlava => published.as_ref().map_or(in_base.clone(), |published| published(&in_base)),
                    _ => stored.to_owned(),
                };
                parts.push(Part { checkpoint, stored: stored.to_owned(), name });
            }
        }
        parts
    }
}

fn llava_layout(checkpoint: &Checkpoint) -> Result<Layout> {
    let has = |part: &str| checkpoint.names().any(|name| name.starts_with(part));
    match (has("language_model."), has("model.language_model.")) {
        (true, false) => Ok(Layout::Llava),
        (false, true) => Ok(Layout::LlavaTransformers5),
        _ => bail!(
            "{} is a LLaVA, but its tensors begin neither all with `language_model.` nor all with \
             `model.language_model.`",
            checkpoint.path().display()
        ),
    }
}

/// From a LLaVA's names, whichever of its classes gave them, to the published ones; with the `vision_model` between the
/// encoder and its layers where this checkpoint has it, and its layers called as there.
fn published_in(checkpoint: &Checkpoint, tower: Option<&EncoderConfig>) -> impl Fn(&str) -> String + use<> {
    let has_vision_model = checkpoint.names().any(|name| name.contains("vision_tower.vision_model."));
    let mut modules: BTreeMap<String, String> = BTreeMap::new(); // what the class calls them, and this checkpoint
    for name in checkpoint.names() {
        let in_tower =
            name.split_once("vision_tower.").map(|(_, name)| name.strip_prefix("vision_model.").unwrap_or(name));
        if let (Some(tower), Some((module, _))) = (tower, in_tower.and_then(|name| name.rsplit_once('.'))) {
            modules.insert(tower.module_name(module), module.to_owned());
        }
    }
    move |name| {
        let renamed =
            LLAVA.iter().find_map(|(published, module)| Some(format!("{published}{}", name.strip_prefix(module)?)));
        let name = renamed.unwrap_or_else(|| name.to_owned());
        let Some(in_tower) = name.strip_prefix("vision_tower.") else { return name };
        let in_tower = in_tower.strip_prefix("vision_model.").unwrap_or(in_tower);
        let known = |(at, _)| Some(format!("{}{}", modules.get(&in_tower[..at])?, &in_tower[at..]));
        let in_tower = in_tower.rmatch_indices('.').find_map(known).unwrap_or_else(|| in_tower.to_owned());
        if has_vision_model {
            format!("vision_tower.vision_model.{in_tower}")
        } else {
            format!("vision_tower.{in_tower}")
        }
    }
}

/// The encoder of a LLaVA; none where the config says nothing that is known here.
fn tower_config(config: Option<&Map<String, Value>>) -> Option<EncoderConfig> {
    EncoderConfig::from_json(config?.get("vision_config")?).ok()
}

/// Whether a tensor of an adapter's file is what PEFT's wrapper of a module that is saved whole keeps of the base.
pub(super) fn is_original(part: &Part) -> bool {
    part.checkpoint == 0 && part.stored.contains(".original_module.")
}

/// The JSON object in a file; none where there is no such file.
pub(super) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).map(Some).with_context(|| format!("{} is not a JSON object", path.display()))
}
