//! Text for people: aligned columns, and colour where a terminal shows it.

use std::fmt::Write as _;
use std::io;

use wgkex_common::style::has_colour;

use crate::fleet::status::printable;

/// Whether texts are coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Colours(pub bool);

/// The meaning of a text, for its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// As the terminal has it.
    Plain,
    /// All is well.
    Good,
    /// Something is wrong.
    Bad,
}

/// A cell of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Tone,
    is_number: bool,
}

impl Colours {
    /// Those of standard output.
    #[must_use]
    pub fn of_stdout() -> Self {
        Self(has_colour(&io::stdout()))
    }

    /// The text in the colour of its tone.
    #[must_use]
    pub fn paint(self, text: &str, tone: Tone) -> String {
        match tone {
            Tone::Good if self.0 => format!("\x1b[32m{text}\x1b[0m"),
            Tone::Bad if self.0 => format!("\x1b[31m{text}\x1b[0m"),
            Tone::Plain | Tone::Good | Tone::Bad => text.to_owned(),
        }
    }
}

impl Cell {
    /// A text, without characters that control a terminal.
    #[must_use]
    pub fn text(text: &str) -> Self {
        Self { text: printable(text), tone: Tone::Plain, is_number: false }
    }

    /// A number, or something else that stands to the right.
    #[must_use]
    pub fn number(number: &impl ToString) -> Self {
        Self { is_number: true, ..Self::text(&number.to_string()) }
    }

    /// In the colour of this tone.
    #[must_use]
    pub fn toned(self, tone: Tone) -> Self {
        Self { tone, ..self }
    }
}

/// The lines of a table whose columns are aligned; without blanks at the end of a line.
#[must_use]
pub fn table<const COLUMNS: usize>(head: [&str; COLUMNS], rows: &[[Cell; COLUMNS]], colours: Colours) -> String {
    let width = |cell: &Cell| cell.text.chars().count();
    let widths: [usize; COLUMNS] =
        std::array::from_fn(|at| rows.iter().map(|row| width(&row[at])).fold(head[at].chars().count(), usize::max));
    let numeric: [bool; COLUMNS] = std::array::from_fn(|at| rows.iter().any(|row| row[at].is_number));
    let head: [Cell; COLUMNS] = std::array::from_fn(|at| Cell { is_number: numeric[at], ..Cell::text(head[at]) });
    let mut lines = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (cell, width_of_column) in row.iter().zip(widths) {
            let fill = " ".repeat(width_of_column - width(cell));
            let text = colours.paint(&cell.text, cell.tone);
            let _ = if cell.is_number { write!(line, "{fill}{text}  ") } else { write!(line, "{text}{fill}  ") };
        }
        lines.push_str(line.trim_end());
        lines.push('\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_whatever_their_colour() {
        let rows = [
            [Cell::text("gw1"), Cell::number(&7), Cell::text("online").toned(Tone::Good)],
            [Cell::text("gateway2"), Cell::number(&1234), Cell::text("")],
        ];
        let expected = "NAME      COUNT  STATE\n\
                        gw1           7  online\n\
                        gateway2   1234\n";
        assert_eq!(table(["NAME", "COUNT", "STATE"], &rows, Colours(false)), expected);
        let coloured = table(["NAME", "COUNT", "STATE"], &rows, Colours(true));
        assert_eq!(coloured, expected.replace("online", "\x1b[32monline\x1b[0m"));
    }

    #[test]
    fn nobody_controls_the_terminal() {
        assert_eq!(Cell::text("a\x1b]0;b\n").text, "a?]0;b?");
    }
}
