//! Values and rows, as both servers have them.

use super::types::DatabaseError;

/// A value of a column, or of a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SqlValue {
    /// A whole number.
    Integer(i64),
    /// A text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
}

/// A row of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row(pub(super) Vec<SqlValue>);

impl From<i64> for SqlValue {
    fn from(number: i64) -> Self {
        Self::Integer(number)
    }
}

impl From<&str> for SqlValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// As 16 bytes, the highest first, so that the order of bytes is that of numbers.
impl From<u128> for SqlValue {
    fn from(number: u128) -> Self {
        Self::Bytes(number.to_be_bytes().to_vec())
    }
}

impl Row {
    /// The number in a column.
    pub fn integer(&self, column: usize) -> Result<i64, DatabaseError> {
        match self.0.get(column) {
            Some(SqlValue::Integer(number)) => Ok(*number),
            other => Err(unexpected(column, other)),
        }
    }

    /// The text in a column.
    pub fn text(&self, column: usize) -> Result<&str, DatabaseError> {
        match self.0.get(column) {
            Some(SqlValue::Text(text)) => Ok(text),
            other => Err(unexpected(column, other)),
        }
    }

    /// The number of up to 128 bits in a column.
    pub fn big(&self, column: usize) -> Result<u128, DatabaseError> {
        match self.0.get(column) {
            Some(SqlValue::Bytes(bytes)) => bytes.as_slice().try_into().map(u128::from_be_bytes),
            other => return Err(unexpected(column, other)),
        }
        .map_err(|_| DatabaseError::Corrupt(format!("column {column} has another length")))
    }

    /// The value that a text in a column is parsed into.
    pub fn parsed<T: std::str::FromStr>(&self, column: usize) -> Result<T, DatabaseError> {
        self.text(column)?.parse().map_err(|_| DatabaseError::Corrupt(format!("column {column} has another form")))
    }
}

fn unexpected(column: usize, found: Option<&SqlValue>) -> DatabaseError {
    let kind = match found {
        Some(SqlValue::Integer(_)) => "a number",
        Some(SqlValue::Text(_)) => "a text",
        Some(SqlValue::Bytes(_)) => "bytes",
        None => "nothing",
    };
    DatabaseError::Corrupt(format!("column {column} has {kind}"))
}
