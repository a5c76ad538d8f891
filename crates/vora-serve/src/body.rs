//! Bodies of requests, read within limits, and bodies of responses.

use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::StatusCode;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use serde_json::Value;
use tokio::time::{Instant, timeout_at};

use crate::chat::ChatStream;
use crate::config::ServeConfig;
use crate::error::ApiError;
use crate::places::Place;

/// How long the rest of a refused body is read, so that the client reads why.
const LINGER: Duration = Duration::from_millis(500);

/// What is sent.
pub(crate) enum ResponseBody {
    /// All at once.
    Whole { bytes: Bytes, content_type: &'static str },
    /// Server-sent events.
    Stream(Box<ChatStream>),
}

impl fmt::Debug for ResponseBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").field("content_type", &self.content_type()).finish_non_exhaustive()
    }
}

impl ResponseBody {
    pub(crate) fn json(value: &Value) -> Self {
        Self::Whole { bytes: value.to_string().into(), content_type: "application/json" }
    }

    pub(crate) fn content_type(&self) -> &'static str {
        match self {
            Self::Whole { content_type, .. } => content_type,
            Self::Stream(_) => "text/event-stream",
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole { bytes, .. } if bytes.is_empty() => Poll::Ready(None),
            Self::Whole { bytes, .. } => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Stream(stream) => stream.poll(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole { bytes, .. } if bytes.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole { bytes, .. } => SizeHint::with_exact(bytes.len() as u64),
            Self::Stream(_) => SizeHint::default(),
        }
    }
}

/// A body on a connection that keeps its place until it is sent.
#[derive(Debug)]
pub(crate) struct Held {
    body: ResponseBody,
    place: Arc<Place>,
}

impl Held {
    pub(crate) fn new(body: ResponseBody, place: Arc<Place>) -> Self {
        Self { body, place }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.place.waits();
    }
}

impl Body for Held {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Reads a body.
///
/// # Errors
/// 413 where it is larger than may be, 408 where it takes too long, 400 where it is cut or its chunks are broken.
pub(crate) async fn read(body: &mut Incoming, config: &ServeConfig) -> Result<Vec<u8>, ApiError> {
    let too_large = || {
        let message = format!("the body has more than {} bytes", config.max_body);
        ApiError::refused(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    let late = || ApiError::refused(StatusCode::REQUEST_TIMEOUT, "the body did not come in time");
    let size = body.size_hint();
    if size.lower() > config.max_body as u64 {
        linger(body).await;
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity((size.lower() as usize).min(1 << 20));
    let end = Instant::now() + config.body_time;
    loop {
        let deadline = end.min(Instant::now() + config.patience);
        match timeout_at(deadline, frame(body)).await.map_err(|_| late())? {
            None => return Ok(bytes),
            Some(Err(_)) => return Err(ApiError::refused(StatusCode::BAD_REQUEST, "the body is cut off or broken")),
            Some(Ok(frame)) => {
                let Ok(data) = frame.into_data() else { continue };
                if bytes.len() + data.len() > config.max_body {
                    drop(bytes);
                    linger(body).await;
                    return Err(too_large());
                }
                bytes.extend_from_slice(&data);
            }
        }
    }
}

/// Reads on for a moment and keeps nothing: a connection that is closed on unread bytes loses the answer too.
pub(crate) async fn linger(body: &mut Incoming) {
    let end = Instant::now() + LINGER;
    while let Ok(Some(Ok(_))) = timeout_at(end, frame(body)).await {}
}

async fn frame(body: &mut Incoming) -> Option<Result<Frame<Bytes>, hyper::Error>> {
    poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await
}
