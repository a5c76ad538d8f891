//! How an answer is written, by a request's numbers, each within its range.

use vora_infer::{ResponseFormat, SamplingParams};

use super::wire::{OneOrMore, Whole, Wire, WireFormat};
use crate::config::ServeConfig;
use crate::error::ApiError;
use crate::state::Loaded;

/// Stop strings of a request, and bytes of each.
const MAX_STOPS: usize = 4;
const MAX_STOP: usize = 256;
/// Likeliest tokens that are told in each place.
const MAX_TOP: i64 = 20;

/// What a request says of how it is answered, checked.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) n: usize,
    pub(super) sampling: SamplingParams,
    pub(super) max_tokens: usize,
    pub(super) stop: Vec<String>,
    pub(super) logprobs: Option<usize>,
    pub(super) format: ResponseFormat,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

impl Rules {
    /// Checks every field; what a request leaves out is as the model's folder has it.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub(super) fn of(wire: &Wire, config: &ServeConfig, loaded: &Loaded) -> Result<Self, ApiError> {
        if wire.tools.as_ref().is_some_and(|tools| !tools.0.is_empty()) {
            return Err(ApiError::invalid("tools", "tools are not supported: leave them out"));
        }
        let most = config.max_n.min(loaded.engine.config().max_waiting); // more could never wait together
        let n = whole("n", wire.n, 1, most as i64)?.unwrap_or(1);
        let (limit, name) = match wire.max_completion_tokens {
            Some(limit) => (Some(limit), "max_completion_tokens"),
            None => (wire.max_tokens, "max_tokens"),
        };
        let max_tokens = whole(name, limit, 1, config.max_tokens as i64)?;
        let stream = wire.stream.unwrap_or(false);
        if wire.stream_options.is_some() && !stream {
            return Err(ApiError::invalid("stream_options", "stream_options are for `stream`: true alone"));
        }
        Ok(Self {
            n: n as usize,
            sampling: sampling(wire, loaded.engine.tokenizer().vocab_size(), &loaded.sampling)?,
            max_tokens: max_tokens.map_or(config.default_max_tokens, |tokens| tokens as usize),
            stop: stops(wire.stop.as_ref())?,
            logprobs: logprobs(wire)?,
            format: wire.response_format.as_ref().map(format).transpose()?.unwrap_or_default(),
            stream,
            include_usage: wire.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false),
        })
    }
}

fn sampling(wire: &Wire, vocab: i64, own: &SamplingParams) -> Result<SamplingParams, ApiError> {
    let mut biases = Vec::new();
    for (token, &bias) in wire.logit_bias.iter().flat_map(|named| &named.0) {
        let id = token.parse().ok().filter(|id| (0..vocab).contains(id));
        let id = id.ok_or_else(|| ApiError::invalid("logit_bias", "logit_bias: a key is no id of a token"))?;
        let bias = number("logit_bias", Some(bias), -100.0, 100.0)?.unwrap_or(0.0);
        biases.push((id, bias as f32));
    }
    let top_p = number("top_p", wire.top_p, 0.0, 1.0)?.unwrap_or(own.top_p);
    let top_k = match wire.top_k {
        Some(Whole(-1)) => 0, // vLLM's word for all
        top_k => whole("top_k", top_k, 0, i64::from(i32::MAX))?.map_or(own.top_k, |k| k as usize),
    };
    let repetition = number("repetition_penalty", wire.repetition_penalty, 0.01, 10.0)?;
    Ok(SamplingParams::default()
        .with_temperature(number("temperature", wire.temperature, 0.0, 2.0)?.unwrap_or(own.temperature))
        .with_top_p(top_p.max(f64::MIN_POSITIVE))
        .with_top_k(top_k)
        .with_min_p(number("min_p", wire.min_p, 0.0, 1.0)?.unwrap_or(own.min_p))
        .with_presence_penalty(number("presence_penalty", wire.presence_penalty, -2.0, 2.0)?.unwrap_or(0.0))
        .with_frequency_penalty(number("frequency_penalty", wire.frequency_penalty, -2.0, 2.0)?.unwrap_or(0.0))
        .with_repetition_penalty(repetition.unwrap_or(own.repetition_penalty))
        .with_logit_bias(biases)
        .with_seed(wire.seed.map_or_else(crate::state::random, |Whole(seed)| seed as u64)))
}

fn stops(stop: Option<&OneOrMore<String>>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(OneOrMore::One(stop)) => vec![stop.clone()],
        Some(OneOrMore::More(stops)) => stops.clone(),
    };
    let wrong = |what: String| Err(ApiError::invalid("stop", what));
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > MAX_STOP) {
        _ if stops.len() > MAX_STOPS => wrong(format!("stop has {} strings, at most {MAX_STOPS} may be", stops.len())),
        Some(stop) => wrong(format!("a string of stop has {} bytes, it must have 1 to {MAX_STOP}", stop.len())),
        None => Ok(stops),
    }
}

fn logprobs(wire: &Wire) -> Result<Option<usize>, ApiError> {
    let top = whole("top_logprobs", wire.top_logprobs, 0, MAX_TOP)?;
    match (wire.logprobs.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as usize)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs `logprobs`: true")),
    }
}

fn format(format: &WireFormat) -> Result<ResponseFormat, ApiError> {
    match &*format.r#type {
        "text" => Ok(ResponseFormat::Text),
        "json_object" => Ok(ResponseFormat::JsonObject),
        "json_schema" => {
            let schema = format.json_schema.as_ref().and_then(|named| named.schema.as_ref());
            let missing = || ApiError::invalid("response_format.json_schema", "json_schema.schema is missing");
            Ok(ResponseFormat::JsonSchema(schema.ok_or_else(missing)?.0.clone()))
        }
        _ => Err(ApiError::invalid(
            "response_format.type",
            "response_format.type is none of text, json_object and json_schema",
        )),
    }
}

fn whole(name: &str, value: Option<Whole>, least: i64, most: i64) -> Result<Option<i64>, ApiError> {
    match value.map(|Whole(value)| value) {
        Some(value) if !(least..=most).contains(&value) => {
            Err(ApiError::invalid(name, format!("{name} is {value}, it must be {least} to {most}")))
        }
        value => Ok(value),
    }
}

fn number(name: &str, value: Option<f64>, least: f64, most: f64) -> Result<Option<f64>, ApiError> {
    match value {
        Some(value) if !(least..=most).contains(&value) => {
            Err(ApiError::invalid(name, format!("{name} is {value}, it must be {least} to {most}")))
        }
        value => Ok(value),
    }
}
