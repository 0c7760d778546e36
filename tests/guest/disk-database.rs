//! Runs in a guest: SQLite databases under write load, and what was acknowledged checked against what is in them.
//!
//!     disk-database DIRECTORY
//!
//! One database with a write-ahead log and one with a rollback journal, both with synchronous=FULL. Each has a server thread behind
//! the loopback interface and a client with a connection to it, which counts the transactions that were acknowledged to it. A
//! transaction moves an amount from one account to another and writes a row about that. After every 25 the client asks for a check:
//! the page cache is dropped, the database is opened anew, and it must be whole (`PRAGMA integrity_check`), have a row for each
//! acknowledged transaction and no other, and balances that follow from the rows.
//!
//! Lines: "tick N writes W sweeps S" ten times a second, W counting acknowledged transactions and S the checks of the database that
//! was checked least; "error …".

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const ACCOUNTS: u64 = 64;
const BALANCE: u64 = 1_000_000;
const TRANSACTIONS_PER_CHECK: u64 = 25;

const OK: c_int = 0;
const ROW: c_int = 100;

#[link(name = "sqlite3", kind = "static")]
unsafe extern "C" {
    fn sqlite3_open(path: *const c_char, database: *mut *mut c_void) -> c_int;
    fn sqlite3_close(database: *mut c_void) -> c_int;
    fn sqlite3_errmsg(database: *mut c_void) -> *const c_char;
    fn sqlite3_prepare_v2(
        database: *mut c_void,
        sql: *const c_char,
        length: c_int,
        statement: *mut *mut c_void,
        tail: *mut *const c_char,
    ) -> c_int;
    fn sqlite3_step(statement: *mut c_void) -> c_int;
    fn sqlite3_column_text(statement: *mut c_void, column: c_int) -> *const c_char;
    fn sqlite3_finalize(statement: *mut c_void) -> c_int;
}

/// An open database, used by one thread.
struct Database(*mut c_void);

impl Database {
    fn open(path: &str) -> Result<Self, String> {
        let path = CString::new(path).map_err(|error| error.to_string())?;
        let mut database = Self(ptr::null_mut());
        // SAFETY: both pointers are valid for the call, and what it stores is closed once, by `drop`.
        let code = unsafe { sqlite3_open(path.as_ptr(), &raw mut database.0) };
        database.check(code, OK).map(|()| database)
    }

    fn check(&self, code: c_int, expected: c_int) -> Result<(), String> {
        if code == expected {
            return Ok(());
        }
        // SAFETY: the database is open or null, which the function allows; the text lasts until the next call.
        let text = unsafe { CStr::from_ptr(sqlite3_errmsg(self.0)) };
        Err(format!("SQLite error {code}: {}", text.to_string_lossy()))
    }

    /// Runs one statement; the first column of its first row.
    fn run(&self, sql: &str) -> Result<String, String> {
        let text = CString::new(sql).map_err(|error| error.to_string())?;
        let mut statement = ptr::null_mut();
        // SAFETY: the pointers are valid for the call, and the statement is finalized below, once.
        let code = unsafe { sqlite3_prepare_v2(self.0, text.as_ptr(), -1, &raw mut statement, ptr::null_mut()) };
        self.check(code, OK)?;
        let mut found = String::new();
        // SAFETY: the statement is prepared and not finalized.
        if unsafe { sqlite3_step(statement) } == ROW {
            // SAFETY: there is a row; the text lasts until the next step.
            let column = unsafe { sqlite3_column_text(statement, 0) };
            if !column.is_null() {
                // SAFETY: it ends with a zero byte.
                found = unsafe { CStr::from_ptr(column) }.to_string_lossy().into_owned();
            }
            // SAFETY: as above. To its end: a statement that writes has not written before.
            while unsafe { sqlite3_step(statement) } == ROW {}
        }
        // SAFETY: once, and the statement is not used any more. The error of the last step is this one's.
        let code = unsafe { sqlite3_finalize(statement) };
        self.check(code, OK).map(|()| found).map_err(|error| format!("{sql}: {error}"))
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // SAFETY: once; no statement is left.
        unsafe { sqlite3_close(self.0) };
    }
}

fn create(path: &str, journal: &str) -> Result<Database, String> {
    let database = Database::open(path)?;
    database.run(&format!("PRAGMA journal_mode={journal}"))?;
    database.run("PRAGMA synchronous=FULL")?;
    database.run("CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER)")?;
    database.run("CREATE TABLE moved(n INTEGER PRIMARY KEY, source INTEGER, target INTEGER, amount INTEGER, filler TEXT)")?;
    database.run("CREATE INDEX by_source ON moved(source)")?;
    database.run("CREATE INDEX by_target ON moved(target)")?;
    database.run("BEGIN")?;
    for id in 0..ACCOUNTS {
        database.run(&format!("INSERT INTO account VALUES({id}, {BALANCE})"))?;
    }
    database.run("COMMIT")?;
    Ok(database)
}

/// What row `n` is filled with, in SQL: of so many characters that rows lie on pages in many ways.
fn filler(n: &str) -> String {
    format!("printf('%0*d', 40 + {n} * 37 % 900, {n} * 7919)")
}

fn transact(database: &Database, n: u64) -> Result<String, String> {
    let (source, target, amount) = (n * 7 % ACCOUNTS, (n * 13 + 5) % ACCOUNTS, n % 97);
    let filler = filler(&n.to_string());
    database.run("BEGIN IMMEDIATE")?;
    database.run(&format!("UPDATE account SET balance = balance - {amount} WHERE id = {source}"))?;
    database.run(&format!("UPDATE account SET balance = balance + {amount} WHERE id = {target}"))?;
    database.run(&format!("INSERT INTO moved VALUES({n}, {source}, {target}, {amount}, {filler})"))?;
    database.run("COMMIT")?;
    Ok(n.to_string())
}

/// Checks a database as the disk has it: how many transactions are in it.
fn check(path: &str) -> Result<String, String> {
    std::fs::write("/proc/sys/vm/drop_caches", "3").map_err(|error| error.to_string())?;
    let database = Database::open(path)?;
    let whole = database.run("PRAGMA integrity_check")?;
    if whole != "ok" {
        return Err(format!("integrity_check: {whole}"));
    }
    let spoiled = database.run(&format!("SELECT count(*) FROM moved WHERE filler != {}", filler("n")))?;
    let wrong = database.run(&format!(
        "SELECT count(*) FROM account WHERE balance != {BALANCE} \
         + (SELECT coalesce(sum(amount), 0) FROM moved WHERE target = account.id) \
         - (SELECT coalesce(sum(amount), 0) FROM moved WHERE source = account.id)"
    ))?;
    if (spoiled.as_str(), wrong.as_str()) != ("0", "0") {
        return Err(format!("{spoiled} rows and {wrong} balances are wrong"));
    }
    let count = database.run("SELECT count(*) FROM moved")?;
    let last = database.run("SELECT coalesce(max(n), 0) FROM moved")?;
    if count != last {
        return Err(format!("{count} transactions, and the last one is {last}"));
    }
    Ok(count)
}

/// Answers "N": transaction N is committed; "check": how many are in the database.
fn serve(mut client: TcpStream, path: &str, database: &Database) -> Result<(), String> {
    let requests = BufReader::new(client.try_clone().map_err(|error| error.to_string())?);
    for request in requests.lines() {
        let request = request.map_err(|error| error.to_string())?;
        let answer = match request.parse() {
            Ok(n) => transact(database, n)?,
            Err(_) => check(path)?,
        };
        writeln!(client, "{answer}").map_err(|error| error.to_string())?;
    }
    Err("the client is gone".to_owned())
}

#[derive(Default)]
struct Counts {
    acknowledged: AtomicU64,
    checks: AtomicU64,
}

fn ask(stream: &mut BufReader<TcpStream>, request: &str) -> Result<String, String> {
    let mut answer = String::new();
    let sent = writeln!(stream.get_mut(), "{request}").and_then(|()| stream.read_line(&mut answer));
    sent.map_err(|error| error.to_string())?;
    Ok(answer.trim_end().to_owned())
}

fn load(stream: TcpStream, counts: &Counts) -> Result<(), String> {
    let mut stream = BufReader::new(stream);
    for n in 1.. {
        let answer = ask(&mut stream, &n.to_string())?;
        if answer != n.to_string() {
            return Err(format!("transaction {n} was answered with '{answer}'"));
        }
        counts.acknowledged.store(n, Ordering::Relaxed);
        if n % TRANSACTIONS_PER_CHECK == 0 {
            let found = ask(&mut stream, "check")?;
            if found != n.to_string() {
                return Err(format!("{n} transactions were acknowledged, and the database has '{found}'"));
            }
            counts.checks.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

fn start(directory: &str, journal: &'static str) -> Arc<Counts> {
    let path = format!("{directory}/{journal}.db");
    let listener = TcpListener::bind("127.0.0.1:0").expect("the loopback interface");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        let served = create(&path, journal).and_then(|database| {
            let (client, _) = listener.accept().map_err(|error| error.to_string())?;
            client.set_nodelay(true).map_err(|error| error.to_string())?;
            serve(client, &path, &database)
        });
        println!("error: {journal}: {served:?}");
    });
    let counts = Arc::new(Counts::default());
    let own = counts.clone();
    std::thread::spawn(move || {
        let stream = TcpStream::connect(address).expect("the loopback interface");
        stream.set_nodelay(true).expect("a socket");
        println!("error: {journal}: {:?}", load(stream, &own));
    });
    counts
}

fn main() {
    let directory = std::env::args().nth(1).expect("a directory");
    let all = ["wal", "delete"].map(|journal| start(&directory, journal));
    for tick in 1_u64.. {
        std::thread::sleep(Duration::from_millis(100));
        let writes: u64 = all.iter().map(|counts| counts.acknowledged.load(Ordering::Relaxed)).sum();
        let checks = all.iter().map(|counts| counts.checks.load(Ordering::Relaxed)).min();
        println!("tick {tick} writes {writes} sweeps {}", checks.unwrap_or(0));
    }
}
