//! Jinja2 as HF transformers sets it up for chat templates, on our engine.

use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Rest;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::date::{seconds_since_epoch, strftime};
use super::source::MODULO;
use super::{filters, methods, python};

/// What a template may do before it is stopped; one unit is an instruction or 64 bytes of text. The templates in use
/// need some tens a turn.
const FUEL: u64 = 200_000;

/// An environment without templates; they are to be [adapted](super::source::adapted).
pub(super) fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.context("the whitespace rules of chat templates")?);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, state, value| Ok(out.write_str(&python::text(state, value)?)?));
    filters::add(&mut environment);
    environment.add_function(MODULO, python::modulo);
    environment.add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| strftime(&format, seconds_since_epoch()));
    Ok(environment)
}
