//! What a client is told in place of an answer, in OpenAI's shape.

use hyper::StatusCode;
use serde_json::{Value, json};
use vora_infer::InferError;

/// A refusal or a failure. Its message holds no address, no path, and nothing of a picture's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
}

impl ApiError {
    /// 400: something in the request is wrong.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::refused(StatusCode::BAD_REQUEST, message) }
    }

    /// 400: the conversation is longer than the model's context.
    pub(crate) fn too_long(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
    }

    /// A refusal that concerns no field.
    pub(crate) fn refused(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, kind: "invalid_request_error", code: None, param: None, message: message.into() }
    }

    /// 401.
    pub(crate) fn unauthorized() -> Self {
        let message = "no valid API key: send one in the header `Authorization: Bearer KEY`";
        Self { code: Some("invalid_api_key"), ..Self::refused(StatusCode::UNAUTHORIZED, message) }
    }

    /// 404 for a model.
    pub(crate) fn no_such_model(asked: &str, known: &[&str]) -> Self {
        let asked: String = asked.chars().take(100).collect();
        let message = format!("there is no model `{asked}` here, only {}", known.join(", "));
        let param = Some("model".to_owned());
        Self { code: Some("model_not_found"), param, ..Self::refused(StatusCode::NOT_FOUND, message) }
    }

    /// 429: ask again later.
    pub(crate) fn overloaded() -> Self {
        let message = "as many requests wait as may: ask again later";
        let refused = Self::refused(StatusCode::TOO_MANY_REQUESTS, message);
        Self { kind: "rate_limit_error", code: Some("rate_limit_exceeded"), ..refused }
    }

    /// 503: not now.
    pub(crate) fn unavailable(message: &str) -> Self {
        Self { kind: "server_error", ..Self::refused(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// 500; the log says more.
    pub(crate) fn failed() -> Self {
        let message = "the model failed on this request; the server's log says more";
        Self { kind: "server_error", ..Self::refused(StatusCode::INTERNAL_SERVER_ERROR, message) }
    }

    /// What the engine said of a request whose pictures came by the fields `pictures`.
    pub(crate) fn of_engine(error: &anyhow::Error, pictures: &[String]) -> Self {
        let Some(known) = error.downcast_ref::<InferError>() else {
            tracing::error!("a request failed: {error:#}");
            return Self::failed();
        };
        let picture = |index: usize| pictures.get(index).cloned().unwrap_or_else(|| "messages".to_owned());
        match known {
            InferError::QueueFull { .. } => Self::overloaded(),
            InferError::Ending => Self::unavailable("the server is ending and takes no more requests"),
            InferError::SeesNoPictures => Self::invalid(picture(0), known.to_string()),
            InferError::BadImage { index, problem } => {
                Self::invalid(picture(*index), format!("the picture cannot be used: {problem}"))
            }
            InferError::PromptTooLong { .. } => Self::too_long("messages", known.to_string()),
            InferError::ContextFull { .. } => Self::too_long("max_tokens", known.to_string()),
            InferError::BadSchema { .. } => Self::invalid("response_format", known.to_string()),
            InferError::BadMessages { .. } => Self::invalid("messages", known.to_string()),
            other => Self::refused(StatusCode::BAD_REQUEST, other.to_string()),
        }
    }

    /// `{"error": {"message", "type", "param", "code"}}`
    pub(crate) fn json(&self) -> Value {
        // Either may hold a word of the request, of any length.
        let (message, param) = (shortened(&self.message), self.param.as_deref().map(shortened));
        json!({"error": {"message": message, "type": self.kind, "param": param, "code": self.code}})
    }
}

/// Characters of a message or a field's name that a client is told.
const MAX_TOLD: usize = 600;

fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_TOLD) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
