//! How much a pass computes, counted from shapes: for a plan of a model whose weights are not there yet.

use anyhow::Result;
use vora_recipe::TrainConfig;
use vora_student::Student;

use super::batch_shape::BatchShape;
use super::blocks::frozen_elements;
use super::parameters::Parameters;

/// Floating-point operations of the matrix products of one pass, two for each element that a token meets:
/// forward, the way back to what is trained, and with `gradient_checkpointing` the layers once more.
pub(super) fn flops(
    config: &TrainConfig,
    student: &Student,
    parameters: &Parameters,
    batch: &BatchShape,
) -> Result<u64> {
    let llm = student.model.llm();
    let (mut frozen, mut trained) = (0, 0); // elements that every token meets
    llm.linears(&mut |_, linear| {
        let (elements, own) = (linear.in_features() as u64 * linear.out_features() as u64, frozen_elements(linear));
        // Of weights in few bits as of whole ones.
        let own = if linear.quantized().is_some() { elements } else { own };
        frozen += own;
        trained += elements - own + linear.num_adapter_parameters() as u64;
        Ok(())
    })?;
    let c = llm.config();
    let heads: i64 =
        (0..c.num_hidden_layers).map(|layer_idx| c.num_attention_heads * c.layer(layer_idx).head_dim).sum();
    let (tokens, again) = (batch.rows * batch.seq, u64::from(config.gradient_checkpointing));
    // A frozen weight makes no gradient of its own; attention makes two for each of its two products.
    let through = tokens * (2 * frozen * (2 + again) + 2 * trained * (3 + again));
    // Several samples of a row do not attend to each other.
    let attended = tokens / batch.samples.max(1);
    let attention = 4 * tokens * attended * heads as u64 * (3 + again);
    let head = if llm.trains_head() { 3 } else { 2 };
    let logits = 2 * batch.targets * (c.vocab_size * c.hidden_size) as u64 * head;
    let of_heads: u64 = parameters.trained.get("aux_vision").copied().unwrap_or(0);
    let teacher = 2 * batch.image_tokens * (parameters.teacher + 3 * of_heads);
    Ok(through + attention + logits + teacher)
}
