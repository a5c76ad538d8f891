//! What lies beside the tensors: `config.json`, tokenizer, image processor.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tch::Kind;
use vora_files::{tell_once, write_bytes};
use vora_llm::hf_class;
use vora_lora::LoraConfig;

use super::layout::Layout;
use super::options::Options;
use super::published;
use super::report::{Change, FileReport};
use super::source::{LLM_PREFIX, Source, read_object};
use super::step::Step;
use crate::beside::{CHAT_TEMPLATE, CHAT_TEMPLATES, PROCESSORS, TOKENIZER, is_text_file, tokenizer_files};
use crate::files::{dtype, keep_auto_map, most, set_dtype};
use crate::llava::LlavaConfig;
use crate::vora::{HfFiles, MERGED, VoraConfig};

const CONFIG: &str = "config.json";

/// A file beside the tensors.
#[derive(Debug)]
pub(super) struct SideFile {
    name: String,
    /// Its bytes, or the file to copy; none where it is dropped.
    content: Option<Content>,
}

#[derive(Debug)]
enum Content {
    Copy(PathBuf),
    New(Vec<u8>),
}

impl SideFile {
    fn new(name: &str, json: &Map<String, Value>) -> Result<Self> {
        Ok(Self { name: name.to_owned(), content: Some(Content::New(serde_json::to_vec_pretty(json)?)) })
    }

    pub(super) fn report(&self) -> FileReport {
        let change = match &self.content {
            Some(Content::Copy(_)) => Change::Kept,
            Some(Content::New(_)) => Change::Made,
            None => Change::Dropped,
        };
        FileReport { name: self.name.clone(), change }
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(&self.name);
        match &self.content {
            Some(Content::Copy(from)) => {
                let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
                write_bytes(&path, &bytes)
            }
            Some(Content::New(bytes)) => write_bytes(&path, bytes),
            None => Ok(()),
        }
    }
}

/// What becomes of the files in the source's folder, and which are new.
pub(super) fn plan(source: &Source, to: Layout, steps: &[Step], options: &Options) -> Result<Vec<SideFile>> {
    let mut files = Vec::new();
    let folder = source.side_folder().filter(|folder| folder.is_dir());
    let config = config(source, to, steps, options.kind)?;
    if options.hf {
        let folder = folder.context("--hf takes a folder, with tokenizer and image processor")?;
        let config = config.clone().context("a VoRA has a config.json")?;
        let made = for_hf(folder, config, steps)?.into_files();
        files.extend(made.map(|(name, bytes)| SideFile { name: name.to_owned(), content: Some(Content::New(bytes)) }));
    } else if let Some(config) = config {
        let is_there = folder.is_some_and(|folder| folder.join(CONFIG).exists());
        if !is_there || source.config.as_ref() != Some(&config) {
            files.push(SideFile::new(CONFIG, &config)?);
        }
    }
    let own = own_files(source, folder)?;
    files.extend(own.files);
    let is_taken = |name: &str| own.takes.contains(&name);
    if let Some((tokenizer, tokenizer_config)) =
        source.gguf().filter(|_| !is_taken("tokenizer.json")).map_or(Ok(None), vora_gguf::folder::tokenizer)?
    {
        let content = Some(Content::New(serde_json::to_vec(&tokenizer)?));
        files.push(SideFile { name: "tokenizer.json".to_owned(), content });
        files.push(SideFile::new("tokenizer_config.json", &tokenizer_config)?);
    }
    let Some(folder) = folder else { return Ok(files) };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry.with_context(|| format!("cannot list {}", folder.display()))?.path();
        // A folder from the hub's cache has links to its files.
        if let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|_| path.is_file()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    names.retain(|name| !is_weights(name) && !is_taken(name) && files.iter().all(|file| file.name != *name));
    for name in names {
        // Other code than ours is for another `config.json`.
        let is_carried = carried(source.layout, to, &name) && !(options.hf && name.ends_with(".py"));
        let content = is_carried.then(|| Content::Copy(folder.join(&name)));
        files.push(SideFile { name, content });
    }
    Ok(files)
}

/// The files for HF transformers, whose config is written as ours are.
fn for_hf(folder: &Path, config: Map<String, Value>, steps: &[Step]) -> Result<HfFiles> {
    let mut vora = VoraConfig::from_json(config)?;
    let mut written = steps.iter().filter_map(|step| step.to.as_deref()?.strip_prefix(LLM_PREFIX));
    if !written.any(|name| vora.has_layer_bias(name)) {
        vora.biases = None;
    }
    HfFiles::new(folder, &vora.to_json()?, most_written(steps).unwrap_or(Kind::Float))
}

/// What the folder of an adapter has itself of tokenizer, chat template and image processor.
#[derive(Default)]
struct OwnFiles {
    files: Vec<SideFile>,
    /// The names of files that the base's folder has no say in.
    takes: Vec<&'static str>,
}

impl OwnFiles {
    /// Takes those of `names` that are in `folder`.
    fn take(&mut self, folder: &Path, names: impl IntoIterator<Item = &'static str>) {
        for name in names {
            self.takes.push(name);
            if folder.join(name).is_file() {
                let content = Some(Content::Copy(folder.join(name)));
                self.files.push(SideFile { name: name.to_owned(), content });
            }
        }
    }
}

/// What an adapter's folder has goes before what lies in its base's, `base`: a tokenizer as a whole, a chat template, an
/// image processor.
fn own_files(source: &Source, base: Option<&Path>) -> Result<OwnFiles> {
    let mut own = OwnFiles::default();
    if !source.is_foreign_adapter() {
        return Ok(own);
    }
    let folder = source.path.as_path();
    let has = |names: &[&str]| names.iter().any(|name| folder.join(name).is_file());
    let template_in = |folder: &Path| -> Result<Option<Value>> {
        Ok(read_object(&folder.join("tokenizer_config.json"))?.and_then(|mut config| config.remove("chat_template")))
    };
    let own_tokenizer = has(&[TOKENIZER]);
    if own_tokenizer {
        own.take(folder, tokenizer_files());
        let of_base = base.map(|base| base.join(TOKENIZER)).filter(|path| path.is_file());
        if of_base.is_some_and(|path| fs::read(path).ok() != fs::read(folder.join(TOKENIZER)).ok()) {
            tell_once(format!("{} has a tokenizer of its own: it is taken, not that of the base", folder.display()));
        }
    }
    if has(&CHAT_TEMPLATES) || (own_tokenizer && template_in(folder)?.is_some()) {
        own.take(folder, CHAT_TEMPLATES);
    } else if own_tokenizer
        && let Some(base) = base.filter(|base| CHAT_TEMPLATES.iter().all(|name| !base.join(name).is_file()))
        && let Some(Value::String(template)) = template_in(base)?
    {
        let content = Some(Content::New(template.into_bytes()));
        own.files.push(SideFile { name: CHAT_TEMPLATE.to_owned(), content });
    }
    if source.layout == Layout::PeftLlava && has(&PROCESSORS) {
        own.take(folder, PROCESSORS);
    }
    Ok(own)
}

/// Whether a file holds tensors, or says where they lie.
fn is_weights(name: &str) -> bool {
    name.ends_with(".index.json")
        || [".safetensors", ".gguf", ".bin", ".pt", ".pth", ".h5", ".msgpack"].iter().any(|end| name.ends_with(end))
}

/// Whether a file of the source says anything about the new checkpoint.
fn carried(from: Layout, to: Layout, name: &str) -> bool {
    let tokenizer = is_text_file(name);
    let processor = PROCESSORS.contains(&name);
    match (from, to) {
        (Layout::Peft, _) => tokenizer || processor || name == CONFIG,
        (Layout::PeftLlm, _) => tokenizer || name == CONFIG,
        (Layout::PeftLlava, _) => tokenizer || processor || name == CONFIG,
        // The published folders bring the code of their model with them.
        (_, Layout::Llm | Layout::FrozenLlm) if from.sees() => !processor && !name.ends_with(".py"),
        _ => true,
    }
}

/// `config.json` of the new checkpoint, where the source has one or something to make it of.
pub(super) fn config(
    source: &Source,
    to: Layout,
    steps: &[Step],
    kind: Option<Kind>,
) -> Result<Option<Map<String, Value>>> {
    let made = match (source.layout, to) {
        (Layout::Gguf, _) => source.gguf().map_or(Ok(None), vora_gguf::folder::config)?,
        (Layout::Vora | Layout::VoraUnmerged, Layout::Llm | Layout::FrozenLlm) => {
            let vora = source.vora.as_ref().context("a VoRA has a config.json")?;
            serde_json::to_value(&vora.llm)?.as_object().cloned()
        }
        (Layout::Llava | Layout::LlavaTransformers5, Layout::Llm) => {
            serde_json::to_value(LlavaConfig::open(&source.path)?.llm)?.as_object().cloned()
        }
        _ => None,
    };
    if let Some(mut config) = made {
        keep_auto_map(&mut config, |_| false);
        if let Some(class) = config.get("model_type").and_then(Value::as_str).and_then(hf_class) {
            config.insert("architectures".into(), json!([class]));
        }
        config.remove("torch_dtype");
        if let Some(kind) = kind.or_else(|| most_written(steps)) {
            config.insert("dtype".into(), dtype(kind).into());
        }
        return Ok(Some(config));
    }
    let Some(mut config) = source.config.clone() else { return Ok(None) };
    if source.layout.merges_into(to) {
        let biased = source.vora.as_ref().filter(|vora| {
            let mut written = steps.iter().filter_map(|step| step.to.as_deref()?.strip_prefix(LLM_PREFIX));
            written.any(|name| vora.has_layer_bias(name))
        });
        match biased.and_then(|vora| vora.biases.clone()) {
            Some(biases) => drop(config.insert("lora".into(), json!(LoraConfig { r: MERGED, ..biases }))),
            None => drop(config.remove("lora")),
        }
    }
    if to == Layout::VoraUnmerged {
        published::set_config(&mut config, source, steps)?;
    }
    let folder = source.side_folder();
    keep_auto_map(&mut config, |file| {
        carried(source.layout, to, file) && folder.is_some_and(|folder| folder.join(file).exists())
    });
    if source.is_foreign_adapter() {
        fit_vocabulary(&mut config, steps, source.llm_prefix(), source.checkpoints.len() - 1);
    }
    if let Some(kind) = kind {
        set_dtype(&mut config, kind);
    }
    Ok(Some(config))
}

/// What an adapter's own embedding and head change: the size of the vocabulary, and whether the two are one.
fn fit_vocabulary(config: &mut Map<String, Value>, steps: &[Step], llm_prefix: &str, base: usize) {
    let written = |name: &str| {
        let name = format!("{llm_prefix}{name}.weight");
        steps.iter().filter(|step| step.to.is_some()).find(|step| step.from[0].name == name)
    };
    let (embedding, head) = (written("model.embed_tokens"), written("lm_head"));
    let mut set = |key: &str, value: Value| {
        // A LLaVA says it of its LLM, and may say it again at its top.
        if let Some(Value::Object(text)) = config.get_mut("text_config") {
            text.insert(key.to_owned(), value.clone());
            if !config.contains_key(key) {
                return;
            }
        }
        config.insert(key.to_owned(), value);
    };
    if let Some(embedding) = embedding.and_then(Step::info) {
        set("vocab_size", embedding.shape[0].into());
    }
    let is_new = |step: &Step| step.from[0].checkpoint != base || step.from.len() > 1;
    if head.is_some_and(|head| is_new(head) || embedding.is_some_and(is_new)) {
        set("tie_word_embeddings", false.into());
    }
}

/// The dtype that most of what is written has.
pub(super) fn most_written(steps: &[Step]) -> Option<Kind> {
    most_by(steps, |step| step.kind)
}

/// The same of what is read.
pub(super) fn most_stored(steps: &[Step]) -> Option<Kind> {
    most_by(steps, |step| step.stored_kind)
}

fn most_by(steps: &[Step], kind_of: impl Fn(&Step) -> Kind) -> Option<Kind> {
    let written = steps.iter().filter(|step| step.to.is_some());
    most(written.map(|step| (kind_of(step), step.shape.iter().product::<i64>() as usize)))
}
