//! A checkpoint's chat template: found, read, rendered.

use std::fmt::Display;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};
use minijinja::{Environment, Error, ErrorKind, Value, context};

use super::Message;
use super::content::{ContentForms, Turn};
use super::jinja::{environments, on_large_stack};
use super::pictures::{IMAGE_TOKEN, with_parts, without_parts};
use super::source::adapted;
use crate::added_tokens::special_tokens;
use crate::error::TextError;
use vora_gguf::folder::{origin, read_json};

/// The longest template that is parsed, in bytes; the longest in use have some tens of thousands.
pub(super) const MAX_TEMPLATE_LEN: usize = 1 << 18;

/// A checkpoint's chat template, rendered as `apply_chat_template` of HF transformers renders it.
///
/// Content is handed over as the template takes it: a string, or a list of parts where it takes no string or shows
/// pictures that are parts.
///
/// Templates are other people's programs: one that runs for too long or writes too much ends in an error.
#[derive(Debug)]
pub struct ChatTemplate {
    pub(super) environments: [Environment<'static>; 2], // with little fuel, and with all
    pub(super) origin: String,
    source: String,
    special_tokens: Vec<(String, String)>, // bos_token, eos_token, ..
    image_token: Option<String>,
    forms: OnceLock<ContentForms>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, else `chat_template.json`, else `chat_template` of `tokenizer_config.json`, else
    /// `tokenizer.chat_template` of the GGUF file that `path` is or holds; in a list of named templates the one called
    /// `default` is meant.
    ///
    /// # Errors
    /// [`TextError::NoChatTemplate`] where there is none; where the file that has it cannot be read or is no template.
    pub fn open(path: &Path) -> Result<Self> {
        let (source, origin) = find(path)?;
        let mut template = Self::new(without_parts(&source), special_tokens(path)?, origin)?;
        if let Some(token) = read_json::<serde_json::Value>(path, "processor_config.json")?["image_token"].as_str() {
            template.image_token = Some(token.to_owned());
        }
        Ok(template)
    }

    /// A template from its source; `special_tokens` are the variables `bos_token`, `eos_token` and so on that it may
    /// use, `origin` is where errors say it came from.
    ///
    /// # Errors
    /// A source that is too long, or is no template.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>, origin: impl Display) -> Result<Self> {
        let origin = origin.to_string();
        ensure!(
            source.len() <= MAX_TEMPLATE_LEN,
            "{origin}: a chat template of {} bytes; at most {MAX_TEMPLATE_LEN} are allowed",
            source.len()
        );
        let read = adapted(source).with_context(|| format!("{origin}: syntax error"))?;
        let mut environments = environments()?;
        for environment in &mut environments {
            let added = environment.add_template_owned("chat_template", read.clone());
            added.map_err(|e| anyhow::anyhow!("{origin}: {e}"))?;
        }
        let image_token = special_tokens.iter().find(|(key, _)| key == "image_token").map(|(_, token)| token.clone());
        let source = source.to_owned();
        Ok(Self { environments, origin, source, special_tokens, image_token, forms: OnceLock::new() })
    }

    /// The conversation as text; images are what the template writes for them, `<image>` where it takes strings. With
    /// `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// What the template itself refuses, and [`TextError::OutOfFuel`] of one that runs for too long or writes too much.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let turns: Vec<Turn> = messages.iter().map(|m| self.forms().turn(m, "<image>", str::to_owned)).collect();
        self.render_turns(&turns, add_generation_prompt)
    }

    /// The source of a template that takes pictures as parts, as HF's processors hand them over, and writes what
    /// [`encode_prompt`](Self::encode_prompt) makes ids of; and what it writes for a picture. [`ChatTemplate::open`] takes
    /// it for this template.
    ///
    /// # Errors
    /// Where it shows pictures itself, and which of what it writes is a picture's place cannot be told.
    pub fn with_pictures(&self) -> Result<(String, String)> {
        let question = [Message::question_about(1, "?")];
        let place = self.forms().place(&question);
        match place.map_err(|written| self.unknown_place(written))? {
            Some(place) => Ok((self.source.clone(), place.to_owned())),
            None => Ok((with_parts(&self.source, self.forms().lists()), IMAGE_TOKEN.to_owned())),
        }
    }

    /// The source, in Jinja.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The error of a template that writes `written` for a picture, where it cannot be told which of it is its place.
    pub(super) fn unknown_place(&self, written: &str) -> anyhow::Error {
        anyhow!(
            "{}: which of `{written}` is a picture's place cannot be told; name it as `image_token` in \
             processor_config.json or tokenizer_config.json",
            self.origin
        )
    }

    /// What the template takes as content.
    pub(super) fn forms(&self) -> &ContentForms {
        let render = |turns: &[Turn], prompt: bool| self.try_render(turns, prompt);
        self.forms.get_or_init(|| ContentForms::of(render, self.image_token.as_deref()))
    }

    pub(super) fn render_turns(&self, turns: &[Turn], add_generation_prompt: bool) -> Result<String> {
        self.try_render(turns, add_generation_prompt).map_err(|error| self.named(&error))
    }

    /// An error of the template with its origin.
    pub(super) fn named(&self, error: &Error) -> anyhow::Error {
        if error.kind() == ErrorKind::OutOfFuel {
            return TextError::OutOfFuel { origin: self.origin.clone() }.into();
        }
        TextError::Template { origin: self.origin.clone(), problem: error.to_string() }.into()
    }

    fn try_render(&self, turns: &[Turn], add_generation_prompt: bool) -> Result<String, Error> {
        match self.render_in(&self.environments[0], turns, add_generation_prompt) {
            Err(error) if error.kind() == ErrorKind::OutOfFuel => {
                // An error keeps the template's values, which are to be let go of there too.
                on_large_stack(|| self.render_whole(turns, add_generation_prompt).map_err(without_values))?
            }
            done => done,
        }
    }

    /// Renders with all the fuel that a template may have, for which the stack must be large.
    pub(super) fn render_whole(&self, turns: &[Turn], add_generation_prompt: bool) -> Result<String, Error> {
        self.render_in(&self.environments[1], turns, add_generation_prompt)
    }

    fn render_in(
        &self,
        environment: &Environment<'static>,
        turns: &[Turn],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let special_tokens = Value::from_pairs(self.special_tokens.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        let template = environment.get_template("chat_template")?;
        let messages: Vec<Value> = turns.iter().map(Turn::to_value).collect();
        template.render(context! { messages, add_generation_prompt, tools => (), documents => (), ..special_tokens })
    }
}

/// The same error as text alone.
fn without_values(error: Error) -> Error {
    let place = error.name().zip(error.line()).map(|(name, line)| format!(" (in {name}:{line})"));
    match error.detail() {
        Some(detail) => Error::new(error.kind(), detail.to_owned() + &place.unwrap_or_default()),
        None => Error::from(error.kind()),
    }
}

/// A checkpoint's template and where it stands.
fn find(path: &Path) -> Result<(String, String)> {
    let jinja = path.join("chat_template.jinja");
    if jinja.exists() {
        let source = std::fs::read_to_string(&jinja).with_context(|| format!("cannot read {}", jinja.display()))?;
        return Ok((source, jinja.display().to_string()));
    }
    for file in ["chat_template.json", "tokenizer_config.json"] {
        let (json, origin) = (read_json::<serde_json::Value>(path, file)?, origin(path, file));
        let source = match &json["chat_template"] {
            serde_json::Value::Null => continue,
            serde_json::Value::String(source) => Some(source.as_str()),
            serde_json::Value::Array(named) => {
                named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str())
            }
            _ => None,
        };
        let source = source.with_context(|| {
            format!("{}: `chat_template` is neither a string nor a list with a `default`", origin.display())
        })?;
        return Ok((source.to_owned(), origin.display().to_string()));
    }
    Err(TextError::NoChatTemplate(path.to_owned()).into())
}
