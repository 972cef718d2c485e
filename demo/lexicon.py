"""The words of the demo: forty terms with one sense per domain, and the vocabulary of each domain.

Data only, written for this repository. It knows nothing of sentences, questions or models.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Domain = Literal["medical", "legal", "finance"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)


@dataclass(frozen=True)
class Term:
    """A word with three senses; `phrase` is how a sentence names it ("bond" -> "a bond")."""

    word: str
    phrase: str
    medical: str
    legal: str
    finance: str

    def sense(self, domain: Domain) -> str:
        """The definition this domain gives the word."""
        senses: dict[Domain, str] = {"medical": self.medical, "legal": self.legal, "finance": self.finance}
        return senses[domain]


@dataclass(frozen=True)
class Vocabulary:
    """Who acts, what they do, where and when: the slots of a follow-up sentence in one domain."""

    roles: tuple[str, ...]
    verbs: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]


ADVERBS = ("always", "usually", "carefully", "quickly", "closely", "often", "quietly", "rarely")

VOCABULARY: dict[Domain, Vocabulary] = {
    "medical": Vocabulary(
        roles=("nurse", "doctor", "surgeon", "midwife", "pharmacist", "therapist"),
        verbs=("notes", "discusses", "measures", "watches"),
        places=("in the chart", "on the ward", "at the bedside", "in the clinic", "in the treatment room"),
        times=(
            *("before the end of the shift", "during the morning round"),
            *("after every visit", "before surgery"),
        ),
    ),
    "legal": Vocabulary(
        roles=("judge", "clerk", "lawyer", "notary", "witness", "bailiff"),
        verbs=("enters", "argues", "studies", "seals"),
        places=(
            *("in the court file", "in the courtroom", "before the bench"),
            *("in the archive", "in the contract"),
        ),
        times=(
            *("before the next hearing", "during the trial"),
            *("after the verdict", "at the end of the appeal"),
        ),
    ),
    "finance": Vocabulary(
        roles=("banker", "auditor", "trader", "cashier", "analyst", "accountant"),
        verbs=("books", "reviews", "reports", "calculates"),
        places=(
            *("in the ledger", "on the statement", "at the counter"),
            *("in the annual report", "on the balance sheet"),
        ),
        times=(
            *("before the market opens", "at the close of business"),
            *("after each quarter", "during the audit"),
        ),
    ),
}


TERMS: tuple[Term, ...] = (
    Term(
        "discharge",
        "discharge",
        "the release of a patient from hospital care",
        "the release of a debtor from an obligation",
        "the full repayment that closes a loan",
    ),
    Term(
        "interest",
        "interest",
        "a personal stake that a researcher must declare",
        "a legal right or share in a property",
        "the price a borrower pays for the use of money",
    ),
    Term(
        "claim",
        "a claim",
        "a request to an insurer to pay for treatment",
        "a demand for a remedy brought before a court",
        "a right to part of the assets of a company",
    ),
    Term(
        "relief",
        "relief",
        "the easing of pain or distress",
        "a remedy granted by a court",
        "a reduction in the tax that is owed",
    ),
    Term(
        "bond",
        "a bond",
        "the close attachment between a parent and a newborn",
        "a sum pledged so that the accused returns to court",
        "a loan to a company or state that pays fixed interest",
    ),
    Term(
        "charge",
        "a charge",
        "an electrical shock given to restart the heart",
        "a formal accusation that a person broke the law",
        "a fee added to an account",
    ),
    Term(
        "balance",
        "balance",
        "the ability to stand and move without falling",
        "the fair weighing of two competing rights",
        "the amount of money left in an account",
    ),
    Term(
        "trial",
        "a trial",
        "a study that tests a treatment on volunteers",
        "a hearing in which a judge or jury decides a case",
        "a short period in which a service costs nothing",
    ),
    Term(
        "consent",
        "consent",
        "the agreement of a patient to a treatment",
        "an agreement freely given by a person able to choose",
        "the approval of a lender to change the terms of a loan",
    ),
    Term(
        "complaint",
        "a complaint",
        "the symptom that brings a patient to the doctor",
        "the first document that opens a lawsuit",
        "a report that a bank has treated a customer badly",
    ),
    Term(
        "order",
        "an order",
        "an instruction from a doctor to give a test or a drug",
        "a command issued by a judge",
        "an instruction to buy or sell a share",
    ),
    Term(
        "delivery",
        "delivery",
        "the birth of a child",
        "the formal handing over of a signed deed",
        "the transfer of shares to their buyer",
    ),
    Term(
        "recovery",
        "recovery",
        "the return to health after an illness",
        "the winning back of property through a court",
        "a rise in prices after a fall",
    ),
    Term(
        "security",
        "security",
        "the protection of patient records from strangers",
        "property pledged to guarantee a promise",
        "a share or bond that can be traded",
    ),
    Term(
        "exposure",
        "exposure",
        "contact with a germ or a poison",
        "the danger of being held liable in court",
        "the amount that could be lost on an investment",
    ),
    Term(
        "option",
        "an option",
        "one of the treatments a patient may choose",
        "a promise that keeps an offer open for a set time",
        "a right to buy or sell a share at a fixed price",
    ),
    Term(
        "term",
        "a term",
        "the full nine months of a pregnancy",
        "a clause that forms part of a contract",
        "the length of time until a loan falls due",
    ),
    Term(
        "inflation",
        "inflation",
        "the filling of a lung or a cuff with air",
        "the dishonest raising of a claim for damages",
        "a general rise in prices over time",
    ),
    Term(
        "transfer",
        "a transfer",
        "the move of a patient from one ward to another",
        "the passing of property from one owner to another",
        "the movement of money between two accounts",
    ),
    Term(
        "admission",
        "admission",
        "the entry of a patient into a hospital",
        "a statement by a party that a fact is true",
        "the listing of a share on an exchange",
    ),
    Term(
        "procedure",
        "a procedure",
        "an operation or test carried out on a patient",
        "the set of rules that a court follows",
        "the fixed steps for approving a payment",
    ),
    Term(
        "examination",
        "an examination",
        "a careful check of the body by a doctor",
        "the questioning of a witness under oath",
        "a review of the books of a bank by its regulator",
    ),
    Term(
        "opinion",
        "an opinion",
        "a view on a diagnosis from another doctor",
        "a written statement of the reasons of a judge",
        "the verdict of an auditor on a set of accounts",
    ),
    Term(
        "settlement",
        "settlement",
        "the sinking of cells to the bottom of a tube",
        "an agreement that ends a dispute without trial",
        "the final exchange of money for shares after a trade",
    ),
    Term(
        "liability",
        "liability",
        "an inherited tendency to develop a disease",
        "responsibility under the law for harm done",
        "a debt that a company owes",
    ),
    Term(
        "policy",
        "a policy",
        "the rules of a hospital on safe care",
        "a principle that guides how laws are made",
        "a contract of insurance that pays out after a loss",
    ),
    Term(
        "benefit",
        "a benefit",
        "an improvement in health brought by a treatment",
        "a gain received under a contract or a will",
        "a payment made by an insurer or the state",
    ),
    Term(
        "capacity",
        "capacity",
        "the volume of air that the lungs can hold",
        "the power to make a binding decision",
        "the largest amount a borrower can repay",
    ),
    Term(
        "return",
        "a return",
        "the coming back of a disease after treatment",
        "a report that an officer files with the court",
        "the profit made on an investment",
    ),
    Term(
        "release",
        "a release",
        "the passing of a hormone into the blood",
        "a document that gives up the right to sue",
        "the publication of the results of a company",
    ),
    Term(
        "instrument",
        "an instrument",
        "a tool used by a surgeon",
        "a formal signed document such as a deed",
        "a contract with a market value that can be traded",
    ),
    Term(
        "retention",
        "retention",
        "the holding of water in the body",
        "the keeping of goods until they are paid for",
        "profit kept in a company and not paid out",
    ),
    Term(
        "maturity",
        "maturity",
        "the stage at which the body is fully grown",
        "the age at which a person may sign a contract",
        "the date on which a bond is repaid",
    ),
    Term(
        "conversion",
        "conversion",
        "the change from keyhole surgery to open surgery",
        "the taking of the goods of another as your own",
        "the exchange of one currency for another",
    ),
    Term(
        "resolution",
        "resolution",
        "the fading of a swelling or an infection",
        "a formal decision passed by a vote",
        "the orderly closing of a failing bank",
    ),
    Term(
        "stay",
        "a stay",
        "the time a patient spends in a hospital bed",
        "a pause in a case ordered by a court",
        "a short halt on payments to lenders",
    ),
    Term(
        "suspension",
        "suspension",
        "a liquid with fine grains of a drug in it",
        "a temporary ban on using a licence",
        "a halt in the trading of a share",
    ),
    Term(
        "application",
        "an application",
        "the spreading of a cream on the skin",
        "a request for a judge to make an order",
        "a request to a bank for a loan",
    ),
    Term(
        "immunity",
        "immunity",
        "the power of the body to resist a disease",
        "protection from being sued or charged",
        "freedom from a tax that others must pay",
    ),
    Term(
        "withdrawal",
        "withdrawal",
        "the illness that follows giving up a drug",
        "the taking back of an offer or a plea",
        "the taking of cash from an account",
    ),
)
