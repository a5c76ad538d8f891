//! Which weight of a model is no number, where what it computes is none.

use tch::Tensor;
use vora_model::VisionLanguageModel;

use crate::error::InferError;

/// The name of the first weight that holds numbers which are not finite; none where all are finite.
pub fn not_finite(model: &dyn VisionLanguageModel) -> Option<String> {
    let tensors = model.tensors().unwrap_or_else(|_| model.llm().tensors());
    let is_finite =
        |tensor: &Tensor| !tensor.is_floating_point() || bool::try_from(tensor.isfinite().all()).unwrap_or(true);
    tensors.into_iter().find(|(_, tensor)| !is_finite(tensor)).map(|(name, _)| name)
}

/// The same error; [`InferError::NotFinite`] with the weight that it comes from, if one is to blame.
pub(crate) fn blamed(error: anyhow::Error, model: &dyn VisionLanguageModel) -> anyhow::Error {
    if !matches!(error.downcast_ref(), Some(InferError::NotFinite)) {
        return error;
    }
    match not_finite(model) {
        Some(name) => error.context(format!("the weight `{name}` has numbers that are not finite")),
        None => error.context("every weight is finite: f32 or bf16 (--dtype) hold larger numbers than f16"),
    }
}
