//! A model's folder made ready to answer: model, tokenizer, chat template, image processor.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind};
use vora_model::{Input, Resolve, VisionLanguageModel};
use vora_text::Tokenizer;
use vora_torch::nn::decode::LoraId;

use crate::adapters::NamedAdapter;
use crate::error::InferError;
use crate::generation_config::GenerationConfig;
use crate::prompter::Prompter;
use crate::request::AdapterChoice;
use crate::{
    Constraint, Generated, OutputModality, Passage, Request, SamplingParams, generate, generate_within, passages,
};

/// A model with everything that stands between it and a person.
#[derive(Debug)]
pub struct Assistant {
    pub(crate) model: Box<dyn VisionLanguageModel>,
    pub(crate) prompter: Prompter,
    pub(crate) generation: GenerationConfig,
    pub(crate) adapters: Vec<NamedAdapter>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Answer {
    /// The text, without special tokens.
    pub text: String,
    /// Its tokens, why it ended, and how long the prompt was.
    pub generated: Generated,
}

impl Assistant {
    /// Opens a folder that `vora merge` wrote, a run's `final/` or checkpoint, or a language model alone: weights,
    /// `tokenizer.json`, chat template, and `preprocessor_config.json` of a model that sees. `resolve` finds the models that a run left where they were; see [`vora_model::open`].
    ///
    /// # Errors
    /// Names the file, and what in it does not fit.
    pub fn open(folder: &Path, device: Device, kind: Kind, resolve: &Resolve<'_>) -> Result<Self> {
        Self::new(vora_model::open(folder, device, kind, resolve)?, folder)
    }

    /// A model that is open already, with what else lies in its folder.
    ///
    /// # Errors
    /// As [`Assistant::open`].
    pub fn new(model: Box<dyn VisionLanguageModel>, folder: &Path) -> Result<Self> {
        let prompter = Prompter::open(&*model, folder)?;
        Ok(Self { model, prompter, generation: GenerationConfig::open(folder)?, adapters: Vec::new() })
    }

    /// Adds an adapter over the model's LLM, which a [`Request`] then asks for by `name`: PEFT's folder, or what a run trained
    /// (its `final/`, or a checkpoint), which sees through its own patch embedding. Requests by several names are answered
    /// together, over one copy of the LLM's weights; the model's own adapters, where it has some, do not act on those that name
    /// another one. `resolve` finds the models that a run left where they were.
    ///
    /// ```no_run
    /// # use std::path::{Path, PathBuf};
    /// # use vora_infer::tch::{Device, Kind};
    /// # use vora_infer::{Assistant, Engine, EngineConfig, Request, RgbImage};
    /// # fn main() -> anyhow::Result<()> {
    /// # let resolve = |name: &str| Ok(PathBuf::from(name));
    /// let mut assistant = Assistant::open(Path::new("SmolLM2"), Device::Cpu, Kind::BFloat16, &resolve)?;
    /// assistant.add_adapter("cats", Path::new("adapters/cats"), &resolve)?;
    /// assistant.add_adapter("dogs", Path::new("adapters/dogs"), &resolve)?;
    /// let engine = Engine::start(assistant, EngineConfig::default())?;
    /// let question = Request::question(Vec::<RgbImage>::new(), "Who are you?");
    /// let (by_cats, by_none) = (engine.stream(question.clone().with_adapter("cats"))?, engine.stream(question)?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A name that is taken; an adapter of another model; what cannot act on some rows of a batch while others have another one,
    /// by name: DoRA, `modules_to_save`, LoRA on an embedding, trained biases.
    pub fn add_adapter(&mut self, name: &str, folder: &Path, resolve: &Resolve<'_>) -> Result<()> {
        ensure!(!self.adapters.iter().any(|adapter| adapter.name == name), "there is an adapter `{name}` already");
        let most = LoraId::MAX_NAMED;
        let id = LoraId::named(self.adapters.len()).with_context(|| format!("more than {most} adapters"))?;
        let adapter = NamedAdapter::attach(&mut *self.model, name, id, folder, resolve);
        self.adapters.push(adapter.with_context(|| format!("the adapter `{name}`"))?);
        Ok(())
    }

    /// The names of the adapters that were added, and whether pictures may be shown to each.
    pub fn adapters(&self) -> impl Iterator<Item = (&str, bool)> {
        let sees = |adapter: &NamedAdapter| adapter.eyes.is_some() || self.model.sees();
        self.adapters.iter().map(move |adapter| (adapter.name.as_str(), sees(adapter)))
    }

    /// The model.
    pub fn model(&self) -> &dyn VisionLanguageModel {
        &*self.model
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.prompter.tokenizer
    }

    /// How answers are written where nobody says otherwise: by the folder's `generation_config.json`, whose `temperature`,
    /// `top_k`, `top_p`, `min_p` and `repetition_penalty` are read. `temperature` is for a folder that has none and does not
    /// say `do_sample` either. A [`Request`] knows nothing of it: it takes the likeliest token until it is told.
    pub fn sampling(&self, temperature: f64) -> SamplingParams {
        self.generation.sampling(temperature)
    }

    /// Answers a request with words, one picture, or both; for a Chameleon, which writes pictures.
    ///
    /// # Errors
    /// [`InferError::WritesNoPictures`]; where it cannot draw what it wrote, and where prompt and picture do not fit its
    /// context.
    pub fn write(&self, request: &Request<'_>, modality: OutputModality) -> Result<Vec<Passage>> {
        let model = self.model.image_writer().ok_or(InferError::WritesNoPictures)?;
        let constraint = Constraint::new(modality, model);
        let (input, stop) = (self.prompt(request)?, self.tokenizer().eos_ids());
        let Request { sampling, max_new_tokens, .. } = request;
        passages(model, &generate_within(&constraint, &input, sampling, stop, *max_new_tokens, |_| true)?.ids)
    }

    /// What is asked, as the model takes it with its own adapters.
    fn prompt(&self, request: &Request<'_>) -> Result<Input> {
        ensure!(
            request.adapter == AdapterChoice::Own,
            "one request alone is answered with the model's own adapters: an Engine takes those that ask for others, or none"
        );
        self.prompter.prompt(request)?.input(&*self.model)
    }

    /// Answers a request; `on_text` gets the text as it comes and may answer false to end it.
    ///
    /// # Errors
    /// Where pictures and places differ in number, and where the prompt is longer than the model's context.
    pub fn reply(&self, request: &Request<'_>, mut on_text: impl FnMut(&str) -> bool) -> Result<Answer> {
        let (input, stop) = (self.prompt(request)?, self.tokenizer().eos_ids());
        let Request { sampling, max_new_tokens, .. } = request;
        let mut stream = self.tokenizer().stream(true);
        let mut failed = None;
        let mut text = String::new();
        let generated =
            generate(&*self.model, &input, sampling, stop, *max_new_tokens, |token| match stream.push(token) {
                Ok(Some(new)) => {
                    text.push_str(&new);
                    on_text(&new)
                }
                Ok(None) => true,
                Err(error) => {
                    failed = Some(error);
                    false
                }
            })?;
        if let Some(error) = failed {
            return Err(error);
        }
        let rest = stream.finish()?;
        if !rest.is_empty() {
            on_text(&rest);
            text.push_str(&rest);
        }
        Ok(Answer { text, generated })
    }
}
