//! Colours of the output of commands and logs.

use std::env;
use std::io::{self, IsTerminal};

/// The style of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Plain text.
    Plain,
    /// With colours for a terminal.
    Coloured,
}

/// The colour of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    /// The terminal's own.
    Plain,
    /// No problem.
    Good,
    /// The operator should check it.
    Odd,
    /// A problem.
    Bad,
}

/// Whether the output has colours: only on a terminal, unless `NO_COLOR` is set (no-color.org).
#[must_use]
pub fn has_colour(output: &impl IsTerminal) -> bool {
    let is_unwanted = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    output.is_terminal() && !is_unwanted
}

impl Style {
    /// That of standard output.
    #[must_use]
    pub fn of_stdout() -> Self {
        if has_colour(&io::stdout()) { Self::Coloured } else { Self::Plain }
    }

    /// The text in this colour.
    #[must_use]
    pub fn paint(self, colour: Colour, text: &str) -> String {
        let code = match (self, colour) {
            (Self::Plain, _) | (_, Colour::Plain) => return text.to_owned(),
            (Self::Coloured, Colour::Good) => 32,
            (Self::Coloured, Colour::Odd) => 33,
            (Self::Coloured, Colour::Bad) => 31,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}
