//! What answers cost.

use anyhow::{Result, bail, ensure};
use vora_infer::{Engine, Event, Request, SamplingParams};

use crate::process::cpu_seconds;

/// The processor's seconds of this process until all requests are answered at once, each with `new` tokens: nothing ends an
/// answer before its time. `prompt` is how long each prompt is to be, where it matters.
///
/// # Errors
/// Where a request fails, or has other numbers of tokens.
pub fn answer_seconds(
    engine: &Engine,
    requests: Vec<Request<'static>>,
    prompt: Option<usize>,
    new: usize,
) -> Result<f64> {
    let never = engine.tokenizer().eos_ids().iter().map(|&id| (id, f32::NEG_INFINITY)).collect();
    let sampling = SamplingParams::default().with_logit_bias(never);
    let before = cpu_seconds()?;
    let start =
        |request: Request<'static>| engine.stream(request.with_sampling(sampling.clone()).with_max_new_tokens(new));
    let streams = requests.into_iter().map(start).collect::<Result<Vec<_>>>()?;
    for event in streams.into_iter().flatten() {
        match event {
            Event::Started { prompt_tokens, .. } => {
                ensure!(prompt.is_none_or(|prompt| prompt == prompt_tokens), "a prompt of {prompt_tokens} tokens");
            }
            Event::Finished { completion_tokens, .. } => {
                ensure!(completion_tokens == new, "{completion_tokens} tokens");
            }
            Event::Failed(error) => bail!(error),
            _ => {}
        }
    }
    Ok(cpu_seconds()? - before)
}
