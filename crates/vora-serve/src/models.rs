//! `/v1/models`: the names that requests call the model by.

use serde_json::{Value, json};

use crate::served::Served;
use crate::state::{Loaded, State};

/// All of them.
pub(crate) fn list(state: &State, loaded: &Loaded) -> Value {
    let data: Vec<Value> = loaded.models.iter().map(|served| one(state, loaded, served)).collect();
    json!({"object": "list", "data": data})
}

/// One of them, where there is one of this name.
pub(crate) fn named(state: &State, loaded: &Loaded, name: &str) -> Option<Value> {
    loaded.served(name).map(|served| one(state, loaded, served))
}

fn one(state: &State, loaded: &Loaded, served: &Served) -> Value {
    json!({
        "id": served.name,
        "object": "model",
        "created": state.started,
        "owned_by": "vora",
        "parent": served.is_named().then_some(&state.config.name),
        "max_model_len": loaded.context,
        "sees": served.sees,
    })
}
