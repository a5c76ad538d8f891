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
    pub(crate) fn no_such_model(asked: &str, known: &[String]) -> Self {
        let asked: String = asked.chars().take(100).collect();
        let message = format!("there is no model `{asked}` here, only {}", known.join(" and "));
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
            InferError::PromptTooLong { .. } => {
                Self { code: Some("context_length_exceeded"), ..Self::invalid("messages", known.to_string()) }
            }
            InferError::ContextFull { .. } => {
                Self { code: Some("context_length_exceeded"), ..Self::invalid("max_tokens", known.to_string()) }
            }
            other => Self::refused(StatusCode::BAD_REQUEST, other.to_string()),
        }
    }

    /// `{"error": {"message", "type", "param", "code"}}`
    pub(crate) fn json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}
