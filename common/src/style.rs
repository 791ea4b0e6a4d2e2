//! Colours of what commands and logs print.

use std::env;
use std::io::{self, IsTerminal};

/// How a text is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// As text.
    Plain,
    /// With colours for a terminal.
    Coloured,
}

/// The colour of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Colour {
    /// All is well.
    Good,
    /// Somebody should look.
    Odd,
    /// Something is wrong.
    Bad,
}

/// Whether what goes there has colours: only where a person looks, who has not asked for none by `NO_COLOR`
/// (no-color.org).
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
            (Self::Plain, _) => return text.to_owned(),
            (Self::Coloured, Colour::Good) => 32,
            (Self::Coloured, Colour::Odd) => 33,
            (Self::Coloured, Colour::Bad) => 31,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}
