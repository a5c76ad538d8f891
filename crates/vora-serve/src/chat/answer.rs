//! An answer's JSON: `chat.completion`, and what it shares with `chat.completion.chunk`.

use serde_json::{Value, json};
use vora_infer::{Event, FinishReason, TokenLogprob};

use super::running::Running;
use crate::error::ApiError;
use crate::state::{now, random};

/// What every part of an answer says.
#[derive(Debug, Clone)]
pub(super) struct Head {
    id: String,
    created: u64,
    model: String,
}

/// Tokens of a request.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Usage {
    prompt: usize,
    cached: usize,
    completion: usize,
}

/// A choice as far as it has come.
#[derive(Debug, Default)]
struct Choice {
    text: String,
    logprobs: Vec<Value>,
    reason: Option<&'static str>,
}

impl Head {
    pub(super) fn new(model: &str) -> Self {
        Self { id: format!("chatcmpl-{:016x}{:016x}", random(), random()), created: now(), model: model.to_owned() }
    }

    /// An object of this kind with `choices`.
    pub(super) fn json(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("vora-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }
}

impl Usage {
    pub(super) fn started(&mut self, prompt: usize, cached: usize, choice: usize) {
        // The prompt counts once, however many answers there are; what the first choice found in the cache is told.
        if choice == 0 {
            (self.prompt, self.cached) = (prompt, cached);
        }
    }

    pub(super) fn finished(&mut self, completion: usize) {
        self.completion += completion;
    }

    pub(super) fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

/// Waits for every choice of a request.
///
/// # Errors
/// Where one of them fails.
pub(super) async fn whole(mut running: Running) -> Result<Value, ApiError> {
    let mut choices: Vec<Choice> = (0..running.rules.n).map(|_| Choice::default()).collect();
    let mut usage = Usage::default();
    while choices.iter().any(|choice| choice.reason.is_none()) {
        let (at, event) = running.events.recv().await.ok_or_else(ApiError::failed)?;
        let choice = &mut choices[at];
        match event {
            Event::Started { prompt_tokens, cached_tokens, .. } => usage.started(prompt_tokens, cached_tokens, at),
            Event::Text { text, tokens } => {
                choice.text.push_str(&text);
                choice.logprobs.extend(tokens.iter().map(logprob));
            }
            Event::Finished { reason, completion_tokens } => {
                usage.finished(completion_tokens);
                choice.reason = Some(finish_reason(reason));
            }
            Event::Failed(error) => return Err(ApiError::of_engine(&error, &running.pictures)),
            _ => {}
        }
    }
    let with_logprobs = running.rules.logprobs.is_some();
    let choices = choices.into_iter().enumerate().map(|(index, choice)| {
        json!({
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": null},
            "logprobs": with_logprobs.then(|| logprobs(choice.logprobs)),
            "finish_reason": choice.reason,
        })
    });
    let mut whole = Head::new(&running.model).json("chat.completion", choices.collect());
    whole["usage"] = usage.json();
    Ok(whole)
}

/// The `logprobs` of a choice.
pub(super) fn logprobs(content: Vec<Value>) -> Value {
    json!({"content": content, "refusal": null})
}

/// A token's entry in them.
pub(super) fn logprob(token: &TokenLogprob) -> Value {
    let entry = |bytes: &[u8], logprob: f32| {
        // OpenAI's least: JSON has no infinity.
        let logprob = f64::from(logprob).max(-9999.0);
        json!({"token": String::from_utf8_lossy(bytes), "bytes": bytes, "logprob": logprob})
    };
    let mut json = entry(&token.bytes, token.logprob);
    json["top_logprobs"] = token.top.iter().map(|(_, bytes, logprob)| entry(bytes, *logprob)).collect();
    json
}

/// OpenAI's word for why an answer ended.
pub(super) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "length",
        _ => "stop",
    }
}
