//! Lines of a conversation: edited by hand in a terminal, and as they come from elsewhere.

use std::io::{BufRead, IsTerminal};

use anyhow::Result;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Where lines come from.
pub(crate) enum Lines {
    ByHand(Box<DefaultEditor>), // arrow keys go back to earlier lines
    Piped,
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Text(String),
    End,
    /// Ctrl-c.
    Interrupted,
}

impl Lines {
    /// Those of standard input.
    pub(crate) fn of_stdin() -> Result<Self> {
        let by_hand = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        Ok(if by_hand { Self::ByHand(Box::new(DefaultEditor::new()?)) } else { Self::Piped })
    }

    /// The next one, without its end.
    pub(crate) fn next(&mut self) -> Result<Line> {
        match self {
            Self::ByHand(editor) => match editor.readline("> ") {
                Ok(line) => {
                    editor.add_history_entry(&line)?;
                    Ok(Line::Text(line))
                }
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(error) => Err(error.into()),
            },
            Self::Piped => {
                let mut line = String::new();
                let read = std::io::stdin().lock().read_line(&mut line)?;
                Ok(if read == 0 { Line::End } else { Line::Text(line) })
            }
        }
    }
}
