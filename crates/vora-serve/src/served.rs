//! The names that requests call the model by, and what each stands for.

use anyhow::{Result, ensure};
use vora_infer::{Assistant, Request};

/// A name, and what answers to it.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) name: String,
    adapter: Adapter,
    pub(crate) sees: bool, // whether it takes pictures
}

/// Which adapter acts on the requests of a name.
#[derive(Debug)]
enum Adapter {
    /// The model's own, where it has some.
    Own,
    /// None.
    None,
    /// The one that was added under the name itself.
    Named,
}

impl Served {
    /// Everything that answers where the model itself is called `name`.
    ///
    /// # Errors
    /// An adapter of a name that is taken.
    pub(crate) fn all(name: &str, assistant: &Assistant) -> Result<Vec<Self>> {
        let sees = assistant.model().sees();
        let mut all = vec![Self { name: name.to_owned(), adapter: Adapter::Own, sees }];
        if assistant.model().lora().is_some() {
            all.push(Self { name: format!("{name}:base"), adapter: Adapter::None, sees });
        }
        for (adapter, sees) in assistant.adapters() {
            ensure!(
                all.iter().all(|known| known.name != adapter),
                "the adapter `{adapter}` has a name of the served model: give one of them another"
            );
            all.push(Self { name: adapter.to_owned(), adapter: Adapter::Named, sees });
        }
        Ok(all)
    }

    /// Whether it is an adapter over the model.
    pub(crate) fn is_named(&self) -> bool {
        matches!(self.adapter, Adapter::Named)
    }

    /// The request as this name answers it.
    pub(crate) fn of(&self, request: Request<'static>) -> Request<'static> {
        match self.adapter {
            Adapter::Own => request,
            Adapter::None => request.without_adapters(),
            Adapter::Named => request.with_adapter(&self.name),
        }
    }
}
